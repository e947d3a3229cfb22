"""Python programs in new processes, some of which kill themselves and are resumed."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from tests import ROOT

_SECONDS = 600  # no program takes as long unless it hangs
_WITHOUT_TRANSFORMERS = ROOT / "tests" / "frameworks" / "without_transformers"


def start(*arguments: object, **environment: str | None) -> subprocess.Popen[str]:
    """Starts ``python ARGUMENTS``; it finds the modules of this project.

    Args:
        environment: what differs from this process; None removes a variable.
    """
    folders = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def without_transformers() -> Iterator[None]:
    """Programs started meanwhile don't find transformers, which mmengine imports for seconds."""
    folders = filter(None, [str(_WITHOUT_TRANSFORMERS), os.environ.get("PYTHONPATH")])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders)):
        yield


def finish(process: subprocess.Popen[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    """Waits for the end of a process; fails, with all it has printed, if that isn't ``status``."""
    try:
        output, errors = process.communicate(timeout=_SECONDS)
    finally:
        process.kill()
    assert process.returncode == status, output + errors
    return subprocess.CompletedProcess(process.args, status, output, errors)


def finish_group(group: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What each process of a distributed group prints."""
    try:
        return [finish(process).stdout for process in group]
    finally:
        for process in group:  # one that waits for another that has failed
            process.kill()


def run(
    *arguments: object, status: int = 0, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """:func:`start` and :func:`finish`."""
    return finish(start(*arguments, **environment), status)


# In the new process.


def run_as_asked(training: Callable[..., object]) -> None:
    """A script of ``training(folder, kill_at=..., resume=...)``:

    python some_run.py FOLDER [--kill-at STEP] [--resume]
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    torch.set_num_threads(1)  # as in the tests, by their fixture `one_thread`
    training(**vars(parser.parse_args()))


def die() -> None:
    """Ends this process at once: no handler runs, and nothing more is written."""
    os.kill(os.getpid(), signal.SIGKILL)
