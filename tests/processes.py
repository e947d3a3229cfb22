"""Python programs in new processes, some of which kill themselves and are resumed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from tests import ROOT
from tests.fork_server import Program, Server

_SECONDS = 600  # no program takes as long unless it hangs
_WITHOUT_TRANSFORMERS = ROOT / "tests" / "frameworks" / "without_transformers"


def start(*arguments: object, **environment: str | None) -> subprocess.Popen[str]:
    """Starts ``python ARGUMENTS``; it finds the modules of this project.

    Args:
        environment: what differs from this process; None removes a variable.
    """
    return start_program(sys.executable, *arguments, **environment)


def start_program(*arguments: object, **environment: str | None) -> subprocess.Popen[str]:
    """:func:`start` of any program."""
    return subprocess.Popen(
        list(map(str, arguments)),
        env=_variables(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _variables(changed: dict[str, str | None]) -> dict[str, str]:
    folders = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **changed}
    return {name: value for name, value in variables.items() if value is not None}


class Fork:
    """A program that runs in a fork of a process with its imports; used as a ``Popen`` is."""

    def __init__(
        self, server: Server, arguments: list[str], environment: dict[str, str], folder: str
    ) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._server = server
        self._folder = tempfile.TemporaryDirectory()
        self._printed = [str(Path(self._folder.name, name)) for name in ("output", "errors")]
        program = Program(arguments, environment, folder, *self._printed, seconds=_SECONDS)
        self._number: int = server.ask({"run": program._asdict()})

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed by its end, which comes by itself after ``_SECONDS``."""
        self.returncode = self._server.ask({"wait": self._number})
        output, errors = (Path(file).read_text() for file in self._printed)
        self._folder.cleanup()
        return output, errors

    def kill(self) -> None:
        """Ends it, if it hasn't ended."""
        if self.returncode is None:
            os.kill(self._number, signal.SIGKILL)
            self.communicate()


def fork(imported: str, *arguments: object, **environment: str | None) -> Fork:
    """As :func:`start`, in a fork of a process that has imported a module once for all programs.

    Not for programs that look at what they import.
    """
    server = _server((imported,), os.environ.get("PYTHONPATH", ""))
    return Fork(server, list(map(str, arguments)), _variables(environment), str(Path.cwd()))


@functools.cache
def _server(imported: tuple[str, ...], path: str) -> Server:
    """The server of this process: where modules are found is settled when it starts."""
    return Server(imported, _variables({}))


@contextlib.contextmanager
def without_transformers() -> Iterator[None]:
    """Programs started meanwhile find neither transformers nor deepspeed.

    mmengine would import them, for seconds.
    """
    folders = filter(None, [str(_WITHOUT_TRANSFORMERS), os.environ.get("PYTHONPATH")])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders)):
        yield


def finish(
    process: subprocess.Popen[str] | Fork, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Waits for the end of a process; fails, with all it has printed, if that isn't ``status``."""
    try:
        output, errors = process.communicate(timeout=_SECONDS)
    finally:
        process.kill()
    assert process.returncode == status, output + errors
    return subprocess.CompletedProcess(process.args, status, output, errors)


def finish_group(group: Sequence[subprocess.Popen[str] | Fork]) -> list[str]:
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


def run_fork(
    imported: str, *arguments: object, status: int = 0, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """:func:`fork` and :func:`finish`."""
    return finish(fork(imported, *arguments, **environment), status)


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
