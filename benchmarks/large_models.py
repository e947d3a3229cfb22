"""What the averaged copy of a large model costs, on paper: memory, bytes moved, time.

    python -m benchmarks.large_models [--parameters 7e9 70e9] [--gpus 8 64] [--mfu 0.5] ...

Prints Markdown. Nothing is timed here and nothing needs torch. Bandwidths and speeds of GPUs,
links and servers are what their makers state, times an assumed fraction; only the rates of a CPU
are measured, and read from results/cpu.json. ``--write FILE`` puts the tables into a page.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import marked

PROGRAM = "large_models.py"  # in the markers of the page
MEASURED = Path(__file__).parent / "results" / "cpu.json"
PARAMETERS, GPUS = (7e9, 70e9, 405e9), (8, 64, 1024)
MODEL_TOO_LARGE, AVERAGE_TOO_LARGE = "model doesn't fit", "average doesn't fit"
STAGING_BYTES = 2 * 64 * 2**20  # of offload="cpu": two buffers of 64 MiB on the device


@dataclass(frozen=True)
class Assumptions:
    """All that the formulas take for granted; each is an option of the command line."""

    bandwidth_gpu: float = 4800.0
    bandwidth_link: float = 64.0
    bandwidth_host: float = 921.6
    fraction: float = 0.8
    flops: float = 989.0
    mfu: float = 0.4
    tokens_per_gpu: float = 16_384.0
    memory: float = 141.0
    reserve: float = 10.0
    gpus_per_server: int = 8
    state_bytes: float = 16.0
    every: int = 10
    trained_fraction: float = 0.01


# The unit of each, and where it comes from. What has no unit is a fraction.
ABOUT = {
    "bandwidth_gpu": ("GB/s", "memory of a GPU; H200, stated by NVIDIA"),
    "bandwidth_link": ("GB/s", "GPU to host, one direction; PCIe 5 x16, stated; one for each GPU"),
    "bandwidth_host": (
        "GB/s",
        "memory of a server, shared by its GPUs; 2 sockets of 12 channels DDR5-4800, stated",
    ),
    "fraction": ("", "of these three bandwidths that is reached; assumed"),
    "flops": ("TFLOP/s", "of a GPU, dense bfloat16; H200, stated by NVIDIA"),
    "mfu": ("", "fraction of them that the training uses; assumed"),
    "tokens_per_gpu": ("tokens", "of a GPU in a step; assumed"),
    "memory": ("GB", "of a GPU; H200, stated by NVIDIA"),
    "reserve": ("GB", "of it for activations and buffers; assumed"),
    "gpus_per_server": ("GPUs", "in a server; HGX H200, stated"),
    "state_bytes": (
        "bytes",
        "a trained parameter: weight, gradient, master copy, Adam's two moments",
    ),
    "every": ("steps", "from update to update, in the rows with `every=`"),
    "trained_fraction": ("", "of the parameters, in the rows with `share_frozen=True`; assumed"),
}


@dataclass(frozen=True)
class Option:
    """One way to keep the average. ``averaged`` and ``source`` are bytes an element."""

    text: str
    layout: str  # "DDP": every rank has the whole; "ZeRO-2": weights whole; "FSDP2": 1/N of each
    averaged: int = 4
    source: int = 2
    offload: bool = False
    overlap: bool = False
    every: bool = False
    share_frozen: bool = False
    swapped: bool = False  # the cost of an evaluation, not of an update
    measured_host: bool = False


OPTIONS = (
    Option("float32 of float32", "DDP", source=4),
    Option("float32 of bfloat16", "DDP"),
    Option("bfloat16, stochastic", "DDP", averaged=2),
    Option('`offload="cpu"`', "DDP", offload=True),
    Option('`offload="cpu"`, attached', "DDP", offload=True, overlap=True),
    Option("float32 of bfloat16", "ZeRO-2"),
    Option("float32 of float32", "FSDP2", source=4),
    Option("float32 of bfloat16", "FSDP2"),
    Option("bfloat16, stochastic", "FSDP2", averaged=2),
    Option("`every={every}`", "FSDP2", every=True),
    Option("`overlap=True`", "FSDP2", overlap=True),
    Option('`offload="cpu"`', "FSDP2", offload=True),
    Option('`offload="cpu"`, attached', "FSDP2", offload=True, overlap=True),
    Option('`offload="cpu"`, measured CPU rate', "FSDP2", offload=True, measured_host=True),
    Option("LoRA, `share_frozen=True`", "FSDP2", share_frozen=True),
    Option("evaluation in `swapped()`", "FSDP2", swapped=True),
)


@dataclass(frozen=True)
class Measured:
    """Rates of updates on the CPU, read from a run of the benchmark; GB/s of counted bytes."""

    about: str
    update: float  # float32 of float32, 12 bytes an element
    mixed: float  # float32 of bfloat16, 10
    flat: float  # torch's lerp_ of one flat float32 tensor, 12
    limit_fraction: float  # of the flat tensor's speed that the float32 update reaches


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds; of one GPU where nothing else is said."""

    model_bytes: float
    average_bytes: float
    host_bytes: float  # of a server
    traffic: dict[str, float]  # bytes an update moves, over "gpu", "link" and "host"
    seconds: float  # of an update; a mean over steps where not every step updates
    exposed: float  # of these, what the training waits for
    step: float  # seconds of a training step
    fits: str  # "" or what doesn't fit

    @property
    def share(self) -> float:
        """Of the time of a training step."""
        return self.exposed / self.step


# ---- The formulas --------------------------------------------------------------------------------


def moved_bytes(averaged: float, source: float) -> float:
    """Of an update, an element: read averaged, write averaged, read source."""
    return 2 * averaged + source


def swapped_bytes(averaged: float, source: float) -> float:
    """Of putting averages in and taking them out again, an element.

    One dtype: both sides read and written, twice. Two dtypes: the source is kept aside (read,
    written), overwritten (average read, source written), compared with the average (that read and
    written in the source's dtype, both read, a flag written and read) and put back (read, written).
    """
    if averaged == source:
        return 2 * 2 * (averaged + source)
    compared = averaged + 3 * source + 2
    return 2 * source + (averaged + source) + compared + 2 * source


def step_seconds(parameters: float, trained: float, a: Assumptions) -> float:
    """Of a training step: 2 forward, 2 backward, 2 for the gradients of what is trained."""
    operations = (4 + 2 * trained) * parameters * a.tokens_per_gpu
    return operations / (a.flops * 1e12 * a.mfu)


def model_bytes(option: Option, parameters: float, gpus: int, a: Assumptions) -> float:
    """Of the training itself, on one GPU: ``state_bytes`` a parameter, less where it is frozen."""
    trained = a.trained_fraction if option.share_frozen else 1.0
    weight, rest = option.source, (a.state_bytes - option.source) * trained
    if option.layout == "DDP":
        return parameters * (weight + rest)
    if option.layout == "ZeRO-2":
        return parameters * (weight + rest / gpus)
    return parameters * (weight + rest) / gpus


def cost(option: Option, parameters: float, gpus: int, a: Assumptions, measured: Measured) -> Cost:
    """Of the average of a model of so many parameters, trained on so many GPUs."""
    trained = a.trained_fraction if option.share_frozen else 1.0
    elements = parameters * trained / (gpus if option.layout == "FSDP2" else 1)
    sharing = min(gpus, a.gpus_per_server)

    kept, host_kept = elements * option.averaged, 0.0
    traffic = {"gpu": elements * moved_bytes(option.averaged, option.source)}
    if option.swapped:
        traffic = {"gpu": elements * swapped_bytes(option.averaged, option.source)}
        kept += elements * option.source if option.averaged != option.source else 0
    if option.offload:
        # The host's memory also takes what comes over the link, before the update reads it.
        traffic = {
            "link": elements * option.source,
            "host": traffic["gpu"] + elements * option.source,
        }
        kept, host_kept = STAGING_BYTES, kept * sharing
    if option.every:
        traffic = {where: moved / a.every for where, moved in traffic.items()}

    host_rate = a.bandwidth_host * a.fraction / sharing
    rates = {
        "gpu": a.bandwidth_gpu * a.fraction,
        "link": a.bandwidth_link * a.fraction,
        "host": measured.mixed if option.measured_host else host_rate,
    }
    # Copies over the link and updates on the host run side by side: the slower one counts.
    seconds = max(moved / (rates[where] * 1e9) for where, moved in traffic.items())
    step = step_seconds(parameters, trained, a)
    exposed = max(0.0, seconds - step / 3) if option.overlap else seconds

    model = model_bytes(option, parameters, gpus, a)
    room = (a.memory - a.reserve) * 1e9
    fits = MODEL_TOO_LARGE if model > room else ""
    if not fits and model + kept > room:
        fits = AVERAGE_TOO_LARGE
    return Cost(model, kept, host_kept, traffic, seconds, exposed, step, fits)


def read_measured(path: Path = MEASURED) -> Measured:
    """The medians of ResNet-50's shapes in a report of ``python -m benchmarks``, as rates."""
    report = json.loads(path.read_text(encoding="utf-8"))
    cases = {
        case["dtypes"]: case
        for case in report["cases"]
        if (case["kind"], case["model"]) == ("lists", "resnet50")
    }

    def rate(case: dict[str, Any], timing: dict[str, float]) -> float:
        return float(case["bytes_moved"] / timing["median"] / 1e9)

    float32, mixed = cases["float32"], cases["bfloat16 into float32"]
    ours = float32["contenders"][0]
    found = report["environment"]
    torch_and_date = f"torch {found['torch']}, {found['date']}"
    return Measured(
        about=f"{found['device']}, {found['threads']} threads, {torch_and_date}",
        update=rate(float32, ours["timing"]),
        mixed=rate(mixed, mixed["contenders"][0]["timing"]),
        flat=rate(float32, float32["limit"]),
        limit_fraction=ours["limit_fraction"],
    )


# ---- The tables ----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, no exponent, and nothing finer than 0.01."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 or value == 0 else "< 0.01"


def size(parameters: float) -> str:
    """Of a model, as one says it: 7B."""
    return f"{parameters / 1e9:.4g}B"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> list[str]:
    rule = "---:" if numbers else "---"
    lines = [f"| {' | '.join(head)} |", f"| --- |{f' {rule} |' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def assumptions_table(a: Assumptions, measured: Measured) -> list[str]:
    """What is taken for granted, then what was measured."""
    rows = []
    for name, (unit, about) in ABOUT.items():
        value = f"{getattr(a, name):,.10g} {unit}".strip()
        rows.append([f"`--{name.replace('_', '-')}`", value, about])
    rates = [
        ["float32 of float32, `Plan.lerp_`", "12", number(measured.update)],
        ["float32 of bfloat16, `Plan.lerp_`", "10", number(measured.mixed)],
        ["for scale, `torch.lerp_` on one flat tensor", "12", number(measured.flat)],
    ]
    return [
        "### Assumptions",
        "",
        "Stated by makers, or assumed; none of them measured by us:",
        "",
        *_table(["option", "value", "what it is"], rows, numbers=False),
        "",
        f"Measured, on a CPU alone ({measured.about}), from the lists on `resnet50` in "
        f"`benchmarks/results/{MEASURED.name}`:",
        "",
        *_table(["update", "bytes an element", "GB/s"], rates),
        "",
        f"That machine's memory states no limit, so which fraction of it this is isn't known; the "
        f"float32 update reached {measured.limit_fraction:.2f} of the flat tensor's speed.",
    ]


def bytes_table(a: Assumptions) -> list[str]:
    """What does not depend on the model's size, a parameter."""
    f, staging = a.trained_fraction, f"{STAGING_BYTES // 2**20} MiB in all"

    def row(text: str, averaged: float, source: float, part: float = 1) -> list[str]:
        kept = number(averaged * part)
        moved = number(moved_bytes(averaged, source) * part)
        return [text, kept, kept, "0", f"{moved} GPU"]

    mixed = moved_bytes(4, 2)
    rows = [
        row("float32 of float32", 4, 4),
        row("float32 of bfloat16", 4, 2),
        row('bfloat16 of bfloat16, `rounding="stochastic"`', 2, 2),
        ['`offload="cpu"`', staging, staging, "4", f"2 link, {number(mixed + 2)} host"],
        [f"`every={a.every}`", "4", "4", "0", f"{number(mixed / a.every)} GPU, the mean"],
        ["`overlap=True`", "4", "4", "0", f"{number(mixed)} GPU, behind the forward"],
        row(f"`share_frozen=True`, {f:.3g} trained", 4, 2, f),
        ["`distance_every=n`", "0 more", "0 more", "0", "0 more: the same pass"],
        ["a deep copy of the module", "4", "4 x N if sharded later", "0", f"{number(mixed)} GPU"],
        ["`swapped()`, in and out", "2 more", "", "0", f"{number(swapped_bytes(4, 2))} GPU"],
        ["... float32 of float32", "0 more", "", "0", f"{number(swapped_bytes(4, 4))} GPU"],
        ["checkpoint", "", "", "", "4 to disk"],
    ]
    head = ["float32 of bfloat16, if not said", "device", "while it is made", "host", "moved"]
    return ["### Bytes a parameter that a rank holds", "", *_table(head, rows)]


def model_table(
    parameters: float, gpus: Sequence[int], a: Assumptions, measured: Measured
) -> list[str]:
    """All options for one model; a layout in which nothing ever fits is one row."""
    rows = []
    for layout in dict.fromkeys(option.layout for option in OPTIONS):
        options = [option for option in OPTIONS if option.layout == layout]
        costs = [[cost(option, parameters, n, a, measured) for n in gpus] for option in options]
        rows.append([f"**{layout}**, the training itself", *map(_training, costs[0])])
        if any(found.fits != MODEL_TOO_LARGE for row in costs for found in row):
            texts = [option.text.format(every=a.every) for option in options]
            for option, text, row in zip(options, texts, costs, strict=True):
                rows.append([text, *(_cell(option, found) for found in row)])
    checkpoint = number(parameters * 4 / 1e9), number(parameters * 2 / 1e9)
    return [
        f"### {size(parameters)}",
        "",
        f"In a checkpoint the average is {checkpoint[0]} GB in float32, {checkpoint[1]} in "
        f"bfloat16; of a sharded one each rank writes its part.",
        "",
        *_table([f"{size(parameters)} on", *(f"{n:,} GPUs" for n in gpus)], rows),
    ]


def _training(found: Cost) -> str:
    memory = f"{number(found.model_bytes / 1e9)} GB"
    if found.fits == MODEL_TOO_LARGE:
        return f"{memory}: {MODEL_TOO_LARGE}"
    return f"{memory}, {number(found.step * 1e3)} ms"


def _cell(option: Option, found: Cost) -> str:
    if found.fits:
        return found.fits
    kept = number(found.average_bytes / 1e9)
    if option.offload:
        kept += f" + {number(found.host_bytes / 1e9)}"
    time = number(found.seconds * 1e3)
    if option.overlap:
        time = f"{number(found.exposed * 1e3)} of {time}"
    cell = f"{kept} GB, {time} ms"
    return cell if option.swapped else f"{cell}, {number(found.share * 100)} %"


def markdown(
    parameters: Sequence[float], gpus: Sequence[int], a: Assumptions, measured: Measured
) -> str:
    """The whole report."""
    parts = [assumptions_table(a, measured), bytes_table(a)]
    parts += [model_table(p, gpus, a, measured) for p in parameters]
    return "\n\n".join("\n".join(part) for part in parts)


# ---- The command line ----------------------------------------------------------------------------


def above_0(kind: type[int] | type[float], most: float = math.inf) -> Callable[[str], float]:
    """A parser of numbers in (0, most]; ``7e9`` is whole as well."""

    def parse(text: str) -> float:
        value = float(text)
        if not 0 < value <= most or math.isinf(value) or value != kind(value):
            limit = "" if most == math.inf else f", at most {most:g}"
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text} found; a {name} above 0{limit} is expected")
        return kind(value)

    return parse


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: the models, the clusters, and an option for each assumption."""
    parser = argparse.ArgumentParser(description="Compute what an average costs large models.")
    parser.add_argument("--parameters", nargs="+", type=above_0(float), default=PARAMETERS)
    parser.add_argument("--gpus", nargs="+", type=above_0(int), default=GPUS)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page with the two markers")
    for name, (unit, about) in ABOUT.items():
        default = getattr(Assumptions, name)
        kind = above_0(type(default), math.inf if unit else 1)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            metavar=unit.partition("/")[0].upper() or "FRACTION",
            help=f"{about} (default: %(default)s)",
        )
    return parser.parse_args(arguments)


def main() -> None:
    """Print the report, or write it into a page."""
    chosen = options()
    a = Assumptions(**{name: getattr(chosen, name) for name in ABOUT})
    report = markdown(chosen.parameters, chosen.gpus, a, read_measured())
    if chosen.write is None:
        print(report)
    else:
        marked.write(chosen.write, PROGRAM, report)


if __name__ == "__main__":
    main()
