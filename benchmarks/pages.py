"""What README and docs/benchmarks.md show of a run: tables between markers, and pictures.

    python -m benchmarks.pages

reads results/cpu.json, and results/growth_cpu.json for how the cost grows: a gigabyte of elements
wants a process of its own on a small machine. They are written anew by

    make bench BENCH="--json benchmarks/results/cpu.json"
    make bench BENCH="--peers growth --json benchmarks/results/growth_cpu.json"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import growth, marked, pictures, records, step
from ema_fused.bench.contenders import FLOAT32, FOREACH, MIXED
from ema_fused.bench.tables import about, is_cold, markdown, tables

ROOT = Path(__file__).parent.parent
MEASURED, GROWN = records.RESULTS / "cpu.json", records.RESULTS / "growth_cpu.json"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
IMAGES = records.IMAGES / "benchmarks"
PROGRAM = "benchmarks"  # in the markers of both pages

Entry = dict[str, Any]

# What README shows: columns by model; rows by kind, dtypes or title, part of the contender's name.
_MODELS = ("resnet50", "gpt2_small", "sdxl_unet", "1000x1024")
_ROWS = (
    ("`torch._foreach_lerp_`, float32 lists", "lists", FLOAT32.name, FOREACH),
    ("a loop of `lerp_`", "lists", FLOAT32.name, "loop: lerp_"),
    ("cast, then foreach: bfloat16 into float32", "lists", MIXED.name, "kept copy"),
    ("foreach four times, for four averages", "several", FLOAT32.name, FOREACH),
    ("torch `AveragedModel`, foreach EMA", "models", FLOAT32.name, "AveragedModel"),
    ("torch `AveragedModel`, mean", "peer", "torch AveragedModel, mean", "original"),
    ("mmengine `EMAHook`, EMA", "peer", "EMAHook, ExponentialMovingAverage", "original"),
    ("mmengine `EMAHook`, SWA", "peer", "EMAHook, StochasticWeightAverage", "original"),
    ("mmdet 3.x `MeanTeacherHook`", "peer", "3.x MeanTeacherHook", "original"),
    ("mmdet 2.x `ExpMomentumEMAHook`", "peer", "2.x ExpMomentumEMAHook", "original"),
    ("mmcv 1.x `EMAHook`", "peer", "1.x EMAHook", "original"),
    ("MMSelfSup 0.x BYOL", "peer", "0.x MomentumUpdateHook, BYOL", "original"),
    ("timm `ModelEmaV3`", "peer", "timm ModelEmaV3", "original"),
    ("timm `ModelEmaV2`", "peer", "timm ModelEmaV2", "original"),
    ("diffusers `EMAModel`", "peer", "diffusers EMAModel", "original"),
    ("ema-pytorch `EMA`", "peer", "ema-pytorch EMA", "original"),
    ("torch-ema", "peer", "torch-ema ExponentialMovingAverage", "original"),
)
# Not measured of each model; a row is left out where it would be empty.
_SOME_ROWS = (("`torch.compile` of foreach, float32 lists", "compiled", FLOAT32.name, "compile"),)


def readme_part(report: dict[str, Any]) -> str:
    """The table of README, with the machine and the command."""
    titles = {case["model"]: case["model_title"] for case in report["cases"]}
    rows = []
    for name, kind, what, part in _ROWS:
        ratios = [_ratio(report, kind, what, model, part) for model in _MODELS]
        rows.append(f"| {name} | {' | '.join(ratios)} |")
    for name, kind, what, part in _SOME_ROWS:
        some = [pictures.find(report, kind, what, model, part) for model in _MODELS]
        if any(some):
            rows.append(f"| {name} | {' | '.join(map(_short, some))} |")
    found = report["environment"]
    caches = ", with cold caches" if is_cold(report["cases"]) else ""
    return "\n".join(
        [
            f"How many times as long as ours others take for one update{caches}: medians of "
            f"one run on {found['device']}, {found['threads']} threads, torch {found['torch']}, "
            f"{found['date']} ([all results](benchmarks/results/{MEASURED.name}), "
            f"`{found['command']}`).",
            "",
            f"| | {' | '.join(titles[model] for model in _MODELS)} |",
            f"| --- |{' ---: |' * len(_MODELS)}",
            *rows,
        ]
    )


def _ratio(report: dict[str, Any], kind: str, what: str, model: str, part: str) -> str:
    contender = pictures.find(report, kind, what, model, part)
    if contender is None:
        raise ValueError(f"{MEASURED} has no {kind} {what!r} of {model} with {part!r}")
    return _short(contender)


def _short(contender: Entry | None) -> str:
    if contender is None:
        return ""
    ratio = float(contender["ratio"])
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}"


def docs_part(report: dict[str, Any], grown: dict[str, Any]) -> str:
    """All tables of both runs, for docs/benchmarks.md."""
    parts = [_titled(markdown(table)) + "\n" + about(grown) for table in growth.table(grown)]
    parts += [f"### The other tables\n\n{about(report)}"]
    parts += [_titled(markdown(table)) for table in [*tables(report), *step.table(report)]]
    return "\n".join(parts).rstrip()


def _titled(table: str) -> str:
    """With the title as a heading."""
    title, _, rest = table.partition("\n")
    return f"### {title.strip('*')}\n{rest}"


def draw(report: dict[str, Any], grown: dict[str, Any], folder: Path) -> list[Path]:
    """The pictures of both runs."""
    without = {**report, "cases": [c for c in report["cases"] if c["kind"] != "growth"]}
    return pictures.draw(without, folder) + pictures.draw(grown, folder)


def main() -> None:
    """Write both pages and draw the pictures."""
    report, grown = records.read(MEASURED), records.read(GROWN)
    marked.write(README, PROGRAM, readme_part(report))
    marked.write(PAGE, PROGRAM, docs_part(report, grown))
    for path in draw(report, grown, IMAGES):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
