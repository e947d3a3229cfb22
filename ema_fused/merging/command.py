"""The command ``python -m ema_fused merge``."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ema_fused.engine.rounding import ROUNDINGS
from ema_fused.merging.adding_up import INTEGERS
from ema_fused.merging.configurations import ADAPTER_CONFIGS
from ema_fused.merging.hashing import HASHES
from ema_fused.merging.merge_files import GIB, Record, merge
from ema_fused.merging.outputs import FORMATS

_UNITS = {"": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1000**_power}


def size(text: str) -> int:
    """The bytes in a text like ``2GiB``, ``500 MB`` or ``1000``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w*)", text.strip())
    if found is None or found[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; one like 2GiB or 500MB is expected")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def dtype(text: str) -> torch.dtype:
    """The floating-point dtype of torch of this name."""
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no floating-point dtype of torch; one like bfloat16 is expected"
        )
    return found


def add_to(commands: Any) -> None:
    """Adds the command's arguments to the program's."""
    parser = commands.add_parser(
        "merge",
        help="the weighted average of checkpoints",
        description="Averages checkpoints of any format in one pass and in bounded memory. Give "
        "the oldest first. A folder of a run stands for the checkpoints in it, by the numbers in "
        "their names.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="PATH[:WEIGHT]",
        help="checkpoints, all with a weight or none; or the folder of a run",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the file or folder to write"
    )
    choosing = parser.add_argument_group("which checkpoints, and how much each counts")
    choosing.add_argument(
        "--schedule",
        help="instead of weights: mean (default), linear, minus-sqrt, ema:DECAY, power:SIGMA",
    )
    choosing.add_argument("--last", type=int, metavar="N", help="only the latest N")
    choosing.add_argument(
        "--every", type=int, metavar="N", help="only every N-th, counted back from the latest"
    )
    choosing.add_argument(
        "--steps", type=int, nargs="+", metavar="STEP", help="of each, for the schedule power"
    )
    choosing.add_argument(
        "--no-normalise",
        action="store_true",
        help="take weights as they are, whatever their sum is",
    )
    _add_tensors(parser.add_argument_group("which tensors, and how they are summed"))
    writing = parser.add_argument_group("reading and writing")
    writing.add_argument("--format", choices=FORMATS, help="default: by the name of the output")
    writing.add_argument(
        "--max-shard-size", type=size, metavar="SIZE", help="of safetensors files in a folder"
    )
    writing.add_argument(
        "--memory", type=size, default=2 * GIB, help="that may be resident; default: 2GiB"
    )
    writing.add_argument(
        "--hash", choices=HASHES, default="crc32", help="of the inputs, kept in the metadata"
    )


def _add_tensors(group: Any) -> None:
    group.add_argument("--key", help="where the weights are in nested dictionaries: model, ema.1")
    group.add_argument("--ignore", metavar="REGEX", help="leave out tensors with such names")
    group.add_argument(
        "--only-common", action="store_true", help="leave out tensors that are not alike in all"
    )
    group.add_argument(
        "--adapter-config",
        choices=ADAPTER_CONFIGS,
        default="equal",
        help="of adapters of PEFT: where it changes what tensors mean, equal in all (default), or "
        "the last's",
    )
    group.add_argument("--allow-nonfinite", action="store_true", help="sum inf and NaN too")
    group.add_argument(
        "--integers",
        choices=INTEGERS,
        default="counters",
        help="from the last checkpoint; or equal in all; default: single numbers from the last, "
        "others equal in all",
    )
    group.add_argument("--float64", action="store_true", help="sum everything in float64")
    group.add_argument("--dtype", type=dtype, help="of floating-point tensors; default: their own")
    group.add_argument("--rounding", choices=ROUNDINGS, default="nearest", help="to 16 bits")
    group.add_argument("--seed", type=int, default=0, help="of stochastic rounding")


def run(given: argparse.Namespace) -> str:
    """Merges as the arguments say; returns the lines to print.

    Raises:
        ValueError, OSError, ImportError: as :func:`~ema_fused.merging.merge_files.merge`.
    """
    paths, weights = split_weights(given.inputs)
    with _warnings_in_short(), _bar() as progress:
        record = merge(
            paths,
            weights,
            output=given.output,
            schedule=given.schedule,
            last=given.last,
            every=given.every,
            key=given.key,
            normalise=not given.no_normalise,
            dtype=given.dtype,
            rounding=given.rounding,
            seed=given.seed,
            float64=given.float64,
            integers=given.integers,
            ignore=given.ignore,
            only_common=given.only_common,
            adapter_config=given.adapter_config,
            allow_nonfinite=given.allow_nonfinite,
            memory=given.memory,
            format=given.format,
            max_shard_bytes=given.max_shard_size,
            hash=given.hash,
            steps=given.steps,
            progress=progress,
        )
    return "\n".join(lines_of(record))


def split_weights(inputs: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Paths and weights from ``PATH:WEIGHT``; None if none has a weight.

    Raises:
        ValueError: some have one.
    """
    paths: list[str] = []
    weights: list[float] = []
    for one in inputs:
        path, colon, number = one.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            colon = ""
        if not colon or Path(one).exists():
            paths.append(one)
        else:
            paths.append(path)
            weights.append(weight)
    if weights and len(weights) < len(paths):
        without = [path for path in paths if path in inputs]
        raise ValueError(
            f"{len(weights)} of {len(paths)} checkpoints have a weight; give all of them one, or "
            f"none. Without: {', '.join(without)}"
        )
    return paths, weights or None


def lines_of(record: Record) -> Iterator[str]:
    """What the command prints of what it has made."""
    width = max(len(one.hash) for one in record.inputs)
    for one in record.inputs:
        yield f"{one.weight:+.6f}  {one.hash:{width}}  {one.path}"
    by = "the given weights" if record.schedule is None else record.schedule
    yield (
        f"{record.path}: {record.bytes:,} bytes from {len(record.inputs)} checkpoints by {by}, "
        f"weights sum to {record.sum:.12g}"
    )
    if record.left_out:
        yield f"left out: {', '.join(record.left_out)}"
    if record.carried_over:
        yield f"carried over from the last: {', '.join(record.carried_over)}"


@contextmanager
def _warnings_in_short() -> Iterator[None]:
    """Warnings as lines of the command, without the place in the source."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        sys.stderr.write(f"warning: {message}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _bar() -> Iterator[Callable[[int, int], object] | None]:
    """A bar on the terminal, if there is one and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    # disable=None: only where stderr is a terminal.
    with tqdm(unit="B", unit_scale=True, desc="merging", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
