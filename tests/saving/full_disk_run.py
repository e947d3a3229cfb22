"""Merges, conversions and saves onto a full disk: a small tmpfs, in a mount namespace of its own.

``unshare -rm python full_disk_run.py DISK FOLDER`` mounts it at DISK, writes the inputs into
FOLDER, and prints as JSON for each case what was raised and what was left. A case of a merge is a
format and how the disk is filled: ``small``, there is too little room from the beginning;
``carried``, for the files that are carried over; ``meanwhile``, another program takes it all while
inputs are read. Saves are those of one process, and of each of two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ema_fused.converting import convert
from ema_fused.merging import merge, open_checkpoint
from ema_fused.saving import checkpoints

SIZE = 4 * 2**20  # of the disk
BEFORE, NEW = 0.5, 2.5  # the elements of the result that was there before, and of the new one
# The formats of merges, and of conversions, and what each writes.
MERGES = {
    "safetensors": "out.safetensors",
    "torch": "out.pt",
    "folder": "out",
    "distributed": "out",
}
CONVERSIONS = {
    "torch": "out.pt",
    "ema_fused": "out.safetensors",
    "ema_fused folder": "out",
    "diffusers": "out",
}


def fill(disk: Path) -> None:
    """Takes all the room that is left."""
    with (disk / "filling").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def outcome(disk: Path, output: Path, action: Callable[[], object]) -> dict[str, Any]:
    """What ``action`` raises, and what is on the disk afterwards."""
    before = sorted(map(str, disk.rglob("*")))
    error: BaseException | None = None
    try:
        action()
    except BaseException as raised:  # torch's CheckpointException is no Exception
        error = raised
    (disk / "filling").unlink(missing_ok=True)
    value = None
    if output.exists():
        value = float(open_checkpoint(output).tensors["w"].tensor().unique())
    return {
        "is_os_error": isinstance(error, OSError),
        "told": None if error is None else str(error),
        "value": value,
        "is_as_before": sorted(map(str, disk.rglob("*"))) == before,
    }


def inputs_of(folder: Path, name: str, size: int, carried: int = 0) -> list[Path]:
    """Two, with elements whose mean is ``BEFORE`` or, if they aren't ``before``, ``NEW``."""
    paths = []
    for number in range(2):
        path = folder / f"{name}-{number}"
        path.mkdir()
        value = number + (BEFORE if name == "before" else NEW) - 0.5
        torch.save({"w": torch.full((size // 4,), value)}, path / "pytorch_model.bin")
        (path / "config.json").write_text('{"model_type": "small"}')
        if carried:
            (path / "vocabulary").write_bytes(bytes(carried))
        paths.append(path)
    return paths


def merges(disk: Path, folder: Path) -> dict[str, Any]:
    half, three_quarters = SIZE // 2, SIZE // 4 * 3
    inputs = {
        "before": inputs_of(folder, "before", 4000),
        "small": inputs_of(folder, "small", 2 * SIZE),
        "carried": inputs_of(folder, "carried", half, carried=three_quarters),
        "meanwhile": inputs_of(folder, "meanwhile", half),
    }
    found = {}
    for kind, name in MERGES.items():
        given: Any = {
            "output": disk / name,
            "format": "safetensors" if kind == "folder" else kind,
        }
        for case in ("small", "meanwhile", *(["carried"] if kind == "folder" else [])):
            clear(disk)
            merge(inputs["before"], **given)
            if case == "meanwhile":
                given["progress"] = lambda *_: fill(disk)
            action = partial(merge, inputs[case], **given)
            found[f"{kind} {case}"] = outcome(disk, disk / name, action)
            given.pop("progress", None)
    return found


def conversions(disk: Path, folder: Path) -> dict[str, Any]:
    [source, _] = inputs_of(folder, "converted", 2 * SIZE)
    found = {}
    for kind, name in CONVERSIONS.items():
        clear(disk)
        target, output = kind.partition(" ")[0], disk / "new" / "run" / name
        action = partial(convert, source, target, output, source="weights", folder=source)
        found[f"convert {kind}"] = outcome(disk, output, action)
    return found


def saves(disk: Path, folder: Path) -> dict[str, Any]:
    found = {}
    for case, output in {"earlier": disk / "out", "new": disk / "new" / "run" / "out"}.items():
        clear(disk)
        if case == "earlier":
            checkpoints.save({"w": torch.full((1000,), BEFORE)}, output)
        state = {"w": torch.full((SIZE // 2,), NEW)}
        found[f"save {case}"] = outcome(disk, output, partial(checkpoints.save, state, output))
    clear(disk)
    checkpoints.save({"w": torch.full((1000,), BEFORE)}, disk / "out")
    return found | dict(zip(("save first", "save second"), by_two(disk, folder), strict=True))


def by_two(disk: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes finds that save a sharded tensor."""
    other = os.fork()
    rank = 0 if other else 1
    try:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        state = {"w": distribute_tensor(torch.full((SIZE // 2,), NEW), mesh, [Shard(0)])}

        def save() -> None:
            try:
                checkpoints.save(state, disk / "out")
            finally:
                dist.barrier()  # the first deletes what was written

        found: list[Any] = [None, None]
        dist.all_gather_object(found, outcome(disk, disk / "out", save))
        dist.destroy_process_group()
        if rank == 0:
            os.waitpid(other, 0)
        return found
    finally:
        if rank == 1:
            os._exit(0)


def clear(disk: Path) -> None:
    subprocess.run(["find", str(disk), "-mindepth", "1", "-delete"], check=True)


def main(disk: Path, folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(disk)], check=True)
    found = saves(disk, folder)
    print(json.dumps({**merges(disk, folder), **conversions(disk, folder), **found}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
