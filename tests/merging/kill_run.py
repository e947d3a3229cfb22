"""Merges in forks that are killed, or interrupted, at each of their actions on files in turn.

``kill_run.py FOLDER`` prints as JSON, for each format and signal a list: for each action what was
at the output afterwards, where an earlier result had been.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ema_fused.merging import merge, open_checkpoint

FORMATS = ("safetensors", "torch", "folder", "distributed")
_SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}


def value_at(path: Path) -> float:
    """That of all elements of the checkpoint there."""
    previous = path.with_name(f"{path.name}.previous")
    tensor = open_checkpoint(path if path.exists() else previous).tensors["w"].tensor()
    if not bool((tensor == tensor[0]).all()):
        raise AssertionError("a mixture")
    return float(tensor[0])


def merge_and_die(inputs: list[Path], output: Path, format: str, actions: int, number: int) -> bool:
    """Whether the merge of a process of its own was done before so many actions on files."""
    child = os.fork()
    if child == 0:
        left = actions

        def act(event: str, arguments: Any) -> None:
            nonlocal left
            is_file_action = event in ("open", "sync") or event.startswith(("os.", "shutil."))
            if is_file_action and (event == "sync" or str(output.parent) in str(arguments)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), number)

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                act("sync", ())
                return real(*given)

            return call

        os.fsync, os.pwrite = counted(os.fsync), counted(os.pwrite)
        sys.addaudithook(act)
        try:
            merge(inputs, output=output, format=format)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            sys.stderr.write(repr(error))
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 130:
        return False
    if os.WEXITSTATUS(status) != 0:
        raise AssertionError("the merge failed")
    return True


def sweep(folder: Path, inputs: list[Path], kind: str, number: int) -> list[dict[str, Any]]:
    """Kills merges at the first action, at the second, ..., until one is done.

    Each meets what the one before has left, as long as that is the earlier result.
    """
    format = "safetensors" if kind == "folder" else kind
    output = folder / f"out{_SUFFIXES.get(kind, '')}"
    found: list[dict[str, Any]] = []
    while not found or not found[-1]["done"]:
        if not found or found[-1]["value"] != 1.0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            merge([inputs[0]], output=output, format=format)
        done = merge_and_die(inputs[1:], output, format, len(found) + 1, number)
        left = sorted(path.name for path in folder.iterdir())
        found.append({"value": value_at(output), "done": done, "left": left})
    return found


def main(folder: Path) -> None:
    inputs = []
    for value in (1.0, 1.5, 2.5):
        inputs.append(folder / f"{value}.pt")
        torch.save({"w": torch.full((70_000,), value)}, inputs[-1])
    found = {}
    for kind in FORMATS:
        place = folder / "results"
        found[f"{kind} SIGKILL"] = sweep(place, inputs, kind, signal.SIGKILL)
        if kind in ("safetensors", "distributed"):
            found[f"{kind} SIGINT"] = sweep(place, inputs, kind, signal.SIGINT)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    main(Path(sys.argv[1]))
