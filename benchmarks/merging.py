"""How fast checkpoints are merged, and in how much memory, beside mergekit and a plain loop.

    python -m benchmarks.merging [--gigabytes 2] [--folder DIR] [--cached] [--json FILE]
        [--write docs/merging.md]

Makes four synthetic checkpoints in each format in a temporary folder. Each contender runs in a
process of its own, in turns; the limit is a loop that reads the same files and writes a file as
large as the result, synchronised to the disk, and adds nothing. Before each, the files are dropped
from the page cache, unless ``--cached``. Ratios of medians are printed; ``--write`` puts what
``--json`` holds into the page.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import marked, records
from ema_fused.bench.environment import environment
from ema_fused.merging.resident import peak_bytes

PROGRAM = "merging.py"  # in the markers of the page
INPUTS = 4
FORMATS = ("safetensors", "sharded", "torch", "distributed")
CONTENDERS = ("ema_fused", "reading and writing", "loop", "mergekit")
_PIECE = 4 * 2**20


def make(folder: Path, total: int, format: str, dtype: torch.dtype) -> list[Path]:
    """Four checkpoints of together ``total`` bytes: some large tensors and many small ones."""
    from safetensors.torch import save_file

    rows = max(1, total // INPUTS // dtype.itemsize // (16 * 1024))
    paths = []
    for number in range(INPUTS):
        generator = torch.Generator().manual_seed(number)
        state = {
            f"layers.{layer}.weight": torch.randn(rows, 1024, generator=generator).to(dtype)
            for layer in range(16)
        }
        state |= {f"layers.{layer}.bias": torch.randn(1024).to(dtype) for layer in range(64)}
        path = folder / f"step-{number}"
        if format == "safetensors":
            path = path.with_suffix(".safetensors")
            save_file(state, path, metadata={"format": "pt"})
        elif format == "sharded":
            _save_shards(state, path)
        elif format == "torch":
            path = path.with_suffix(".pt")
            torch.save(state, path)
        else:
            from torch.distributed.checkpoint import state_dict_saver

            state_dict_saver.save({"model": state}, checkpoint_id=path, no_dist=True)
        paths.append(path)
    return paths


def _save_shards(state: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    path.mkdir()
    names = list(state)
    places: dict[str, str] = {}
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        own = names[number::4]
        save_file({name: state[name] for name in own}, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    text = json.dumps({"metadata": {}, "weight_map": places})
    (path / "model.safetensors.index.json").write_text(text)


def files_of(paths: list[Path]) -> list[Path]:
    return [
        file
        for path in paths
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.is_file()
    ]


def drop(paths: list[Path]) -> None:
    """Drops the files from the page cache, after what is still to be written was."""
    for file in files_of(paths):
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


# ---- The contenders; each in a process of its own ------------------------------------------------


def read_and_write(paths: list[Path], output: Path) -> None:
    memory = memoryview(bytearray(_PIECE))
    size = 0
    for file in files_of(paths):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(memory):
                size += count
    with output.open("wb", buffering=0) as written:
        for start in range(0, size // INPUTS, _PIECE):
            written.write(memory[: min(_PIECE, size // INPUTS - start)])
        os.fsync(written.fileno())


def merge(paths: list[Path], output: Path) -> None:
    import ema_fused.merging

    ema_fused.merging.merge(paths, output=output)


def loop(paths: list[Path], output: Path) -> None:
    """What is written by hand: load each, add in float32, divide, save."""
    from safetensors.torch import load_file, save_file

    total: dict[str, Any] = {}
    dtypes = {}
    for path in paths:
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
        else:
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            state = {name: one for file in files for name, one in load_file(file).items()}
        for name, tensor in state.items():
            dtypes[name] = tensor.dtype
            if name in total:
                total[name].add_(tensor)
            else:
                total[name] = tensor.float()
    mean = {name: (tensor / len(paths)).to(dtypes[name]) for name, tensor in total.items()}
    if output.suffix == ".pt":
        torch.save(mean, output)
    else:
        output = output if output.suffix else output.with_suffix(".safetensors")
        save_file(mean, output)
    with output.open("rb+") as file:
        os.fsync(file.fileno())


def mergekit(paths: list[Path], output: Path) -> None:
    """``mergekit-pytorch``, which takes files of any model."""
    merge_raw_pytorch: Any = importlib.import_module("mergekit.scripts.merge_raw_pytorch")
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps({"merge_method": "linear", "models": models}))
    merge_raw_pytorch.main([str(config), str(output.with_suffix(""))], standalone_mode=False)
    os.sync()


_RUN: dict[str, Callable[[list[Path], Path], None]] = {
    "ema_fused": merge,
    "reading and writing": read_and_write,
    "loop": loop,
    "mergekit": mergekit,
}


# Before the time begins to run.
_IMPORTED = {
    "ema_fused": ("ema_fused.merging", "torch.distributed.checkpoint"),
    "reading and writing": (),
    "loop": ("safetensors.torch",),
    "mergekit": ("mergekit.scripts.merge_raw_pytorch",),
}


def can(contender: str, format: str) -> bool:
    if contender == "mergekit":
        is_there = importlib.util.find_spec("mergekit") is not None
        return is_there and format in ("safetensors", "torch")
    return contender != "loop" or format != "distributed"


def run_here(contender: str, paths: list[Path], output: Path) -> dict[str, float]:
    """Seconds, and the most memory that this process has had."""
    warnings.simplefilter("ignore")
    for module in _IMPORTED[contender]:
        importlib.import_module(module)
    torch.empty(1).add_(1)
    start = time.perf_counter()
    _RUN[contender](paths, output)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_bytes()}


# ---- The whole -----------------------------------------------------------------------------------


def run_beside(contender: str, paths: list[Path], output: Path) -> dict[str, float]:
    """:func:`run_here` in a new process."""
    command = [sys.executable, "-m", "benchmarks.merging", "--one", contender, str(output)]
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender} failed:\n{done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    place: Path, total: int, formats: list[str], repeats: int, dtype: torch.dtype, *, cached: bool
) -> list[dict[str, Any]]:
    """A row for each format and contender: median seconds, the ratio to the limit, the peak."""
    rows = []
    for format in formats:
        with tempfile.TemporaryDirectory(dir=place) as name:
            folder = Path(name)
            paths = make(folder, total, format, dtype)
            suffix = {"safetensors": ".safetensors", "torch": ".pt"}.get(format, "")
            found: dict[str, list[dict[str, float]]] = {}
            for _ in range(repeats):
                for contender in CONTENDERS:
                    if not can(contender, format):
                        continue
                    with tempfile.TemporaryDirectory(dir=folder) as out:
                        if not cached:
                            drop(paths)
                        one = run_beside(contender, paths, Path(out, f"out{suffix}"))
                    found.setdefault(contender, []).append(one)
        limit = statistics.median(one["seconds"] for one in found["reading and writing"])
        for contender, runs in found.items():
            seconds = statistics.median(one["seconds"] for one in runs)
            rows.append(
                {
                    "format": format,
                    "contender": contender,
                    "seconds": seconds,
                    "ratio": seconds / limit,
                    "peak_bytes": max(one["peak"] for one in runs),
                }
            )
    return rows


def table(report: dict[str, Any]) -> str:
    """As Markdown: times over the limit, and peaks of resident memory."""
    lines = [
        f"Four checkpoints, {report['bytes'] / 1e9:g} GB together, {report['dtype']}, read from "
        f"{'the page cache' if report['cached'] else 'the disk'}; medians of {report['repeats']}.",
        "",
        "| format | contender | time over reading and writing | peak memory |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        peak = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        lines.append(f"| {row['format']} | {row['contender']} | {row['ratio']:.2f} | {peak} |")
    return "\n".join(lines)


def _command(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(["python -m benchmarks.merging", *given])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time merges of checkpoints.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the four inputs together")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the files; default: TMPDIR")
    parser.add_argument("--cached", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with the two markers")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        contender, output, *paths = given.one
        print(json.dumps(run_here(contender, [Path(path) for path in paths], Path(output))))
        return
    total = int(given.gigabytes * 1e9)
    dtype: torch.dtype = getattr(torch, given.dtype)
    place = given.folder or Path(tempfile.gettempdir())
    rows = measure(place, total, given.formats, given.repeats, dtype, cached=given.cached)
    report = {
        "environment": environment(torch.device("cpu")) | {"command": _command(arguments)},
        "bytes": total,
        "dtype": given.dtype,
        "cached": given.cached,
        "repeats": given.repeats,
        "rows": rows,
    }
    if given.json is not None:
        records.write(given.json, report)
    if given.write is not None:
        marked.write(given.write, PROGRAM, table(report))
    print(table(report))


if __name__ == "__main__":
    main()
