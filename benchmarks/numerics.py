"""Averages in 16 bits beside float32, on a network that is trained meanwhile.

    python -m benchmarks.numerics [--json benchmarks/results/numerics_cpu.json]
        [--draw docs/images/numerics] [--write docs/numerics.md]

Trains the network of examples/digits.py in float32 and averages its bfloat16 weights, as mixed
precision keeps them, in several ways at once; beside them a float64 average by
``ema_fused.reference``. ``--json`` trains and writes what was found; ``--draw`` and ``--write``
make the picture and the page's table of results/numerics_cpu.json. About a minute.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks import drawing, marked, records
from ema_fused import ExponentialMovingAverage
from ema_fused.bench.environment import environment
from ema_fused.engine import reference
from examples import digits

NAME = "numerics_cpu.json"
PROGRAM = "numerics.py"  # in the markers of the page
SEEDS = (0, 1, 2)
EPOCHS = 32  # of averaging
EACH = 2  # epochs from one look at the averages to the next
EARLIER = 4  # epochs before: the averages begin as copies of a network that has learnt something
MOMENTA = (0.001, 0.01)
CURVES = ("distance", "moved", "accuracy")

# What the averages of the bfloat16 weights are kept as.
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"averaged_dtype": torch.float32},
    "bfloat16, stochastic": {"rounding": "stochastic"},
    "bfloat16, every=64": {"every": 64},
    "bfloat16, nearest": {},
}

Curves = dict[str, dict[str, list[float]]]  # by kind and momentum, then by what is measured


def train(seed: int, epochs: int = EPOCHS) -> Curves:
    """Trains one network; after every second epoch, how far each average is from the float64 one
    (% of its norm), which part of its elements isn't what it was at first (%), and its test
    accuracy (%).
    """
    torch.manual_seed(seed)
    digits.DEVICE = torch.device("cpu")  # what is found is said of the CPU, on every machine
    training, test = digits.load_data(seed)
    batches = DataLoader(training, digits.BATCH_SIZE, shuffle=True, drop_last=True)
    model = digits.build_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=digits.LEARNING_RATE, momentum=0.9)

    def epoch(after_step: Callable[[], object]) -> None:
        model.train()
        for images, labels in batches:
            noisy = images + digits.PIXEL_NOISE * torch.randn_like(images)
            loss = cross_entropy(model(noisy), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()

    for _ in range(EARLIER):
        epoch(lambda: None)
    kept = Kept(model)
    curves: Curves = {f"{kind} {m}": {name: [] for name in CURVES} for m, kind in kept.averages}
    for number in range(1, epochs + 1):
        epoch(lambda: kept.update(model))
        if number % EACH:
            continue
        for (momentum, kind), averaged in kept.averages.items():
            found = kept.compare(averaged, momentum)
            accuracy = digits.accuracy(_evaluated(averaged.module), test)
            for name, value in zip(CURVES, (*found, accuracy), strict=True):
                curves[f"{kind} {momentum}"][name] += records.rounded([value], 4)
    curves["steps"] = {"steps": [len(batches) * n for n in range(EACH, epochs + 1, EACH)]}
    return curves


class Kept:
    """The bfloat16 weights of a network, and all the averages of them."""

    def __init__(self, model: nn.Module) -> None:
        self.half = copy.deepcopy(model).to(torch.bfloat16)
        self.first = _flat(self.half)
        self.averages = {
            (momentum, kind): ExponentialMovingAverage(
                self.half, momentum=momentum, update_buffers=True, **options
            )
            for momentum in MOMENTA
            for kind, options in KINDS.items()
        }
        self.references = dict.fromkeys(MOMENTA, self.first)
        self.copied = False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of every average; the first copies."""
        state = self.half.state_dict()
        for name, tensor in model.state_dict().items():
            state[name].copy_(tensor)
        for averaged in self.averages.values():
            averaged.update_parameters(self.half)
        source = _flat(self.half)
        if not self.copied:
            self.first, self.copied = source, True
            self.references = dict.fromkeys(MOMENTA, source)
            return
        for momentum, earlier in self.references.items():
            self.references[momentum] = reference.average(earlier, source, momentum)

    def compare(self, averaged: ExponentialMovingAverage, momentum: float) -> tuple[float, float]:
        """Its distance from the float64 average, and the part that has moved, both in percent."""
        found, exact = _flat(averaged.module), self.references[momentum]
        distance = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        return 100 * distance, 100 * float(np.mean(found != self.first))


def _flat(model: nn.Module) -> NDArray[np.float64]:
    """All parameters in one row."""
    tensors: list[Tensor] = [p.detach().double().flatten() for p in model.parameters()]
    row: NDArray[np.float64] = torch.cat(tensors).numpy()
    return row


def _evaluated(averaged: nn.Module) -> nn.Module:
    """The averaged network in float32, which changes no value, so that only weights differ."""
    return copy.deepcopy(averaged).to(torch.float32)


def measure() -> dict[str, Curves]:
    """The curves of every seed."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "averages are kept in 16 bits")  # that is shown here
        return {str(seed): train(seed) for seed in SEEDS}


# ---- The picture and the table -------------------------------------------------------------------


def draw(report: dict[str, Any], theme: drawing.Theme) -> Figure:
    """Three panels over the steps, at the smaller momentum; lines are means over the seeds."""
    figure = Figure(figsize=(drawing.WIDTH, 3.3))
    panels = figure.subplots(1, 3)
    orange, green, pink, *_ = theme.others
    colors = dict(zip(KINDS, (theme.ours, green, pink, orange), strict=True))
    titles = ("distance from the exact one", "elements that have moved", "test accuracy")
    units = ("% of its norm", "% of all", "%")
    for panel, name, title, unit in zip(panels, CURVES, titles, units, strict=True):
        panel.set(title=title, ylabel=unit, xlabel="step (momentum 0.001)")
        for kind, color in colors.items():
            x, y = _mean_curve(report, f"{kind} {MOMENTA[0]}", name)
            panel.plot(x, y, color=color, lw=1.8)
    distance, moved, accuracy = panels
    distance.set(yscale="log", ylim=(1e-6, 300))
    moved.set(ylim=(0, 105))
    for panel, kind, at in (
        (distance, "bfloat16, nearest", (620, 90)),
        (distance, "bfloat16, stochastic", (620, 5)),
        (distance, "bfloat16, every=64", (620, 0.12)),
        (distance, "float32", (620, 3e-6)),
        (moved, "bfloat16, nearest", (620, 24)),
        (accuracy, "bfloat16, nearest", (150, 76)),
    ):
        panel.text(*at, kind, color=colors[kind])
    moved.text(620, 90, "the other three", color=theme.text)
    accuracy.text(620, 95, "the other three", color=theme.text)
    return figure


def _mean_curve(report: dict[str, Any], average: str, name: str) -> tuple[list[float], list[float]]:
    """The steps, and the mean over the seeds of what was measured after each."""
    runs = list(report["seeds"].values())
    each = zip(*(run[average][name] for run in runs), strict=True)
    return runs[0]["steps"]["steps"], [statistics.fmean(values) for values in each]


def markdown(report: dict[str, Any]) -> str:
    """The table of the page: what was found after the last step."""
    about, runs = report["environment"], list(report["seeds"].values())
    steps = runs[0]["steps"]["steps"][-1]
    lines = [
        f"After {steps:,} averaged steps, means of {len(runs)} trainings (in brackets the lowest "
        f"and the highest); torch {about['torch']}, {about['date'].partition(' ')[0]}, "
        f"`{about['command']}`:",
        "",
        "| momentum | average kept in | distance from the exact one | elements moved | accuracy |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for momentum in MOMENTA:
        for kind in KINDS:
            found = [[run[f"{kind} {momentum}"][name][-1] for run in runs] for name in CURVES]
            distance, moved, accuracy = found
            lines.append(
                f"| {momentum} | {kind} | {_number(statistics.fmean(distance))} % "
                f"| {statistics.fmean(moved):.1f} % | {statistics.fmean(accuracy):.1f} % "
                f"({min(accuracy):.1f} to {max(accuracy):.1f}) |"
            )
    return "\n".join(lines)


def _number(percent: float) -> str:
    return f"{percent:.2g}" if percent >= 0.01 else "< 0.01"


def main() -> None:
    """Train, draw, or write the page's table."""
    parser = argparse.ArgumentParser(description="Averages in 16 bits beside float32.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="train, and write this")
    parser.add_argument("--draw", type=Path, metavar="STEM", help="draw results/" + NAME)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page with the two markers")
    chosen = parser.parse_args()
    if chosen.json is not None:
        seeds = measure()
        about = environment(torch.device("cpu"))
        records.write(chosen.json, {"environment": about, "seeds": seeds})
    if chosen.draw is not None:
        drawing.save(chosen.draw, partial(draw, records.read(records.RESULTS / NAME)))
    if chosen.write is not None:
        marked.write(chosen.write, PROGRAM, markdown(records.read(records.RESULTS / NAME)))


if __name__ == "__main__":
    main()
