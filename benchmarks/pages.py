"""What README and docs/benchmarks.md show of a run: tables between markers, and pictures.

    python -m benchmarks.pages

reads results/cpu.json, and results/growth_cpu.json for how the cost grows: a gigabyte of elements
wants a process of its own on a small machine. README shows results/gpu_*.json too: gpu_check.sh
writes them where there is a GPU. The first two are written anew by

    make bench BENCH="--json benchmarks/results/cpu.json"
    make bench BENCH="--peers growth --json benchmarks/results/growth_cpu.json"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import apex, growth, marked, pictures, records, step
from ema_fused.bench.contenders import BFLOAT16, FLOAT32, FOREACH, MIXED, OUR_LISTS
from ema_fused.bench.tables import about, is_cold, markdown, tables

ROOT = Path(__file__).parent.parent
MEASURED, GROWN = records.RESULTS / "cpu.json", records.RESULTS / "growth_cpu.json"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
IMAGES = records.IMAGES / "benchmarks"
PROGRAM = "benchmarks"  # in the markers of both pages
ON_GPUS = "benchmarks on GPUs"  # and in README's of these

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
# What README shows of a GPU, as above, with the figure of the contender; a row is left out where it
# would be empty.
_GPU_KINDS = ("lists", "compiled", "sharded", "apex")
_GPU_ROWS = (
    ("ours, of the copy's speed: float32", "limit_fraction", "lists", FLOAT32.name, OUR_LISTS),
    ("ours, bfloat16 into float32", "limit_fraction", "lists", MIXED.name, OUR_LISTS),
    ("ours, bfloat16", "limit_fraction", "lists", BFLOAT16.name, OUR_LISTS),
    ("`torch._foreach_lerp_`, float32 lists", "ratio", "lists", FLOAT32.name, FOREACH),
    ("`torch._foreach_lerp_`, bfloat16 lists", "ratio", "lists", BFLOAT16.name, FOREACH),
    ("cast, then foreach: bfloat16 into float32", "ratio", "lists", MIXED.name, "kept copy"),
    ("foreach four times, for four averages", "ratio", "several", FLOAT32.name, FOREACH),
    ("torch `AveragedModel`, foreach EMA", "ratio", "models", FLOAT32.name, "AveragedModel"),
    ("foreach on DTensors", "ratio", "sharded", FLOAT32.name, "foreach lerp of DTensors"),
    ("`torch.compile` of foreach", "ratio", "compiled", FLOAT32.name, "compile"),
    ("apex `multi_tensor_axpby`", "ratio", "apex", apex.AXPBY, apex.AXPBY),
    ("apex `FusedAdamSWA`, beside Adam and ours", "ratio", "apex", apex.ADAM, apex.ADAM),
)


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


# ---- GPUs ----------------------------------------------------------------------------------------


def gpu_part(files: Sequence[Path]) -> str:
    """README's tables of runs on GPUs, one for each file.

    Raises:
        ValueError: a file is that of a rehearsal, or of a run on a CPU.
    """
    if not files:
        return "No GPU has run it yet, so there is no figure of one."
    return "\n\n".join(map(_of_gpu, files))


def gpu_files() -> list[Path]:
    """The runs on GPUs that there are."""
    return sorted(records.RESULTS.glob("gpu_*.json"))


def _of_gpu(file: Path) -> str:
    report = records.read(file)
    found = report["environment"]
    if report.get("rehearsal") or report["smoke"] or "capability" not in found:
        raise ValueError(
            f"{file} shows nothing of a GPU: it is of a rehearsal, a smoke run or a CPU; README "
            "takes what benchmarks/gpu_check.sh writes where there is a GPU"
        )
    titles = {c["model"]: c["model_title"] for c in report["cases"] if c["kind"] in _GPU_KINDS}
    rows = []
    for name, key, kind, what, part in _GPU_ROWS:
        cells = [_figure(pictures.find(report, kind, what, model, part), key) for model in titles]
        if any(cells):
            rows.append(f"| {name} | {' | '.join(cells)} |")
    failed = len(report["failed"])
    copied = max(report["copy"]["bytes_per_second"]) / 1e9
    return "\n".join(
        [
            f"How many times as long as ours others take for one update on {found['device']}, and "
            "how near ours comes to a copy within the device, which moves "
            f"{copied:,.0f} GB/s: medians of one run, driver {found['driver']}, "
            f"torch {found['torch']}, {found['date']} "
            f"([all results](benchmarks/results/{file.name}), `{found['command']}`)"
            + (f"; {failed} of its cases failed." if failed else "."),
            "",
            f"| | {' | '.join(titles.values())} |",
            f"| --- |{' ---: |' * len(titles)}",
            *rows,
        ]
    )


def _figure(contender: Entry | None, key: str) -> str:
    if contender is None:
        return ""
    return _short(contender) if key == "ratio" else f"{contender[key]:.2f}"


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
    marked.write(README, ON_GPUS, gpu_part(gpu_files()))
    marked.write(PAGE, PROGRAM, docs_part(report, grown))
    for path in draw(report, grown, IMAGES):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
