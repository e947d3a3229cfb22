"""How fast an averaged update is, beside every other way to do it, on the CPU.

    python benchmarks/update_speed.py [--sets resnet50 1000x1024] [--threads 2] [--json FILE]

Prints Markdown tables of ratios: a contender's median time over ours, both from this one run, in
which they took turns. Times stand beside them for orientation only. Before anything is timed,
each contender's result is compared with torch's, to the bit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import contenders
import shapes
import timing
import torch

import ema_fused

_TITLES = {
    "lists": "Prepared lists, float32",
    "mixed": "Prepared lists, float32 average of a bfloat16 source",
    "several": "Prepared lists, several float32 averages of one source",
    "models": "Whole averaged models, float32: `update_parameters`",
}


@dataclass(frozen=True)
class Row:
    """One contender on one set of shapes; ``ratio`` is its median over ours."""

    group: str
    shapes: str
    contender: str
    ratio: float
    timing: timing.Timing


def measure(set_names: list[str], rounds: int, sample_seconds: float, seed: int) -> list[Row]:
    """Check and time all groups of contenders on these sets of shapes."""
    known = shapes.SHAPE_SETS | shapes.SMOKE_SETS
    rows = []
    for set_name in set_names:
        for group in contenders.groups(known[set_name](), seed):
            print(f"measuring {set_name}, {group.name}", file=sys.stderr, flush=True)
            contenders.check(group, seed + 1)
            calls = {contender.name: contender.update for contender in group.contenders}
            with torch.no_grad():
                timings = timing.time_in_turns(calls, rounds, sample_seconds)
            ours = timings[group.contenders[0].name].median
            rows += [
                Row(group.name, set_name, name, found.median / ours, found)
                for name, found in timings.items()
            ]
    return rows


def environment() -> dict[str, str | int]:
    """The machine and the versions that the numbers belong to."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ema_fused": ema_fused.__version__,
        "backend": ", ".join(ema_fused.Plan([torch.zeros(1)], [torch.ones(1)]).backends),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def markdown(rows: list[Row], about: dict[str, str | int]) -> str:
    """The whole report: a table a group, a column a set of shapes."""
    set_names = list(dict.fromkeys(row.shapes for row in rows))
    cells = {(row.group, row.contender, row.shapes): row for row in rows}
    lines = [", ".join(f"{key} {value}" for key, value in about.items() if key != "command")]
    lines += ["", f"`{about['command']}`"]
    for group in dict.fromkeys(row.group for row in rows):
        lines += ["", f"### {_TITLES[group]}", ""]
        lines.append(f"| contender | {' | '.join(set_names)} |")
        lines.append(f"| --- |{' ---: |' * len(set_names)}")
        for name in dict.fromkeys(row.contender for row in rows if row.group == group):
            found = [cells[group, name, set_name] for set_name in set_names]
            texts = [f"**{row.ratio:.2f}** ({_duration(row.timing.median)})" for row in found]
            lines.append(f"| {name} | {' | '.join(texts)} |")
    lines += ["", "Cells: the median time over that of the table's first row (the median time)."]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--smoke`` overrides what would take long."""
    parser = argparse.ArgumentParser(description="Time averaged updates on the CPU.")
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=list(shapes.SHAPE_SETS),
        default=list(shapes.DEFAULT_SETS),
        help="sets of shapes to measure; large wants about 4 GB of memory (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=40, help="samples each (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the tensors' values (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as JSON")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes and two rounds: does it run at all?"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print the tables, and write the JSON where it was asked for."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    sets, rounds, sample_seconds = chosen.sets, chosen.rounds, timing.SAMPLE_SECONDS
    if chosen.smoke:
        sets, rounds, sample_seconds = list(shapes.SMOKE_SETS), 2, 0.0
    rows = measure(sets, rounds, sample_seconds, chosen.seed)
    about = environment()
    print(markdown(rows, about))
    if chosen.json is not None:
        report = {"environment": about, "results": [asdict(row) for row in rows]}
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
