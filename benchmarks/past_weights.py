"""What each kind of average makes of the past: the weight of every step in it.

    python -m benchmarks.past_weights [--json benchmarks/results/past_weights_cpu.json]
        [--draw docs/images/past_weights]

The averages themselves are run, on a model of one parameter that is the t-th unit vector after
step t: what its average then holds are the weights of the steps. ``--json`` writes them,
``--draw`` draws the picture of what is written in results/past_weights_cpu.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import drawing, records
from ema_fused import (
    BaseAveragedModel,
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    PowerFunctionEMA,
    StochasticWeightAverage,
)
from ema_fused.bench.environment import environment

NAME = "past_weights_cpu.json"
STEPS = 400
EMA = ExponentialMovingAverage


class OneHot(nn.Module):
    """A model whose only parameter says which step it is."""

    weight: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(steps, dtype=torch.float64))

    @torch.no_grad()
    def be_at(self, step: int) -> None:
        """Becomes what it is after ``step``, counted from 0."""
        self.weight.zero_()
        self.weight[step] = 1.0


# By the Python that makes them. Momenta suit the 400 steps of the picture: in a run of 400,000 they
# are a thousandth of these.
AVERAGES: dict[str, Callable[[OneHot], BaseAveragedModel]] = {
    "EMA(momentum=0.02)": lambda m: EMA(m, momentum=0.02),
    "EMA(momentum=0.01)": lambda m: EMA(m, momentum=0.01),
    "EMA(momentum=0.004)": lambda m: EMA(m, momentum=0.004),
    "SWA()": StochasticWeightAverage,
    "SWA(begin_step=201)": lambda m: StochasticWeightAverage(m, begin_step=201),
    "Annealing(momentum=0.004, gamma=3)": lambda m: MomentumAnnealingEMA(
        m, momentum=0.004, gamma=3
    ),
    "ExpMomentum(momentum=0.004, gamma=40)": lambda m: ExpMomentumEMA(m, momentum=0.004, gamma=40),
    "Cosine(momentum=0.02)": lambda m: CosineEMA(m, momentum=0.02, max_iters=STEPS),
    "EMA(momentum=0.01, every=20)": lambda m: EMA(m, momentum=0.01, every=20),
    "EMA(momentum=0.01, interval=20)": lambda m: EMA(m, momentum=0.01, interval=20),
}
WIDTHS = (0.05, 0.1, 0.2)


def weights_of(make: Callable[[OneHot], BaseAveragedModel], steps: int = STEPS) -> list[float]:
    """The weight of every step in the average after the last, oldest first."""
    model = OneHot(steps)
    averaged = make(model)
    for step in range(steps):
        model.be_at(step)
        averaged.update_parameters(model)
    weights: list[float] = averaged.module.state_dict()["weight"].tolist()
    return weights


def power_weights(widths: Sequence[float] = WIDTHS, steps: int = STEPS) -> dict[str, list[float]]:
    """The same of power-function averages, which are kept together."""
    model = OneHot(steps)
    ema = PowerFunctionEMA(model, widths)
    for step in range(steps):
        model.be_at(step)
        ema.update_parameters(model)
    return {f"Power(sigma_rel={w})": ema.average(w)["weight"].tolist() for w in widths}


def measure() -> dict[str, list[float]]:
    """The weights of all kinds by name; each sums to 1."""
    return {name: weights_of(make) for name, make in AVERAGES.items()} | power_weights()


# ---- The picture ---------------------------------------------------------------------------------

TOP = 2.4  # percent: what reaches higher is cut off, and said
At = tuple[float, float]


def draw(weights: dict[str, list[float]], theme: drawing.Theme) -> Figure:
    """Six panels over the steps of one run: what each average weighs."""
    figure = Figure(figsize=(drawing.WIDTH, 5.4))
    panels = list(figure.subplots(2, 3, sharex=True).flatten())
    for panel in panels:
        panel.set(xlim=(-6, STEPS + 6), ylim=(0, TOP), xticks=range(0, STEPS + 1, 100))
    for panel in panels[::3]:
        panel.set_ylabel("weight in the average (%)")
    for panel in panels[3:]:
        panel.set_xlabel("training step")
    fixed, started, mean, power, cosine, sparse = panels
    orange, green, *_ = theme.others
    blue = theme.ours
    slow = weights["EMA(momentum=0.004)"]

    fixed.set_title("EMA, fixed momentum")
    _line(fixed, slow, green, "0.004", (110, 0.2))
    _line(fixed, weights["EMA(momentum=0.02)"], orange, "0.02", (310, 1.35))
    _line(fixed, weights["EMA(momentum=0.01)"], blue, "0.01", (262, 0.52))
    _point(
        fixed,
        f"the first copy keeps {100 * slow[0]:.0f} %\nat 0.004, "
        f"{100 * weights['EMA(momentum=0.01)'][0]:.1f} % at 0.01",
        (1, 2.2),
        (32, 1.98),
    )

    started.set_title("EMA 0.004, started fast")
    started.set(ylim=(0, 1.2), yticks=[0, 0.5, 1])
    _line(started, slow, green, "fixed (first copy 20 %)", (10, 1.1))
    by_exp = weights["ExpMomentum(momentum=0.004, gamma=40)"]
    _line(started, by_exp, orange, "exponential\n(gamma=40)", (100, 0.45))
    annealing = weights["Annealing(momentum=0.004, gamma=3)"]
    _line(started, annealing, blue, "annealing\n(gamma=3)", (205, 0.7))

    mean.set_title("StochasticWeightAverage")
    _line(mean, weights["SWA()"], blue, "from the start", (8, 0.32))
    _line(mean, weights["SWA(begin_step=201)"], orange, "begin_step=201", (215, 0.57))

    power.set_title("PowerFunctionEMA, by sigma_rel")
    places = ((312, 1.9), (298, 1.0), (150, 0.25))
    for width, color, at in zip(WIDTHS, (orange, blue, green), places, strict=True):
        _line(power, weights[f"Power(sigma_rel={width})"], color, f"{width:.2f}", at)

    cosine.set_title("CosineEMA, 0.02 to 0")
    _line(cosine, weights["Cosine(momentum=0.02)"], blue, "", (0, 0))

    sparse.set_title("EMA 0.01, one call in 20")
    sparse.set(ylim=(0, 24))
    for name, color, at in (("every", blue, (170, 10)), ("interval", orange, (215, 2.0))):
        kept = weights[f"EMA(momentum=0.01, {name}=20)"]
        steps = [step + 1 for step, weight in enumerate(kept) if weight > 0]
        sparse.plot(steps, [100 * kept[step - 1] for step in steps], ".", color=color, ms=5)
        sparse.text(*at, f"{name}=20", color=color)
    first = weights["EMA(momentum=0.01, interval=20)"][0]
    _point(sparse, f"interval=20: the first\ncopy keeps {100 * first:.0f} %", (1, 23), (32, 20.2))
    return figure


def _point(axes: Axes, text: str, tip: At, at: At) -> None:
    color = axes.yaxis.label.get_color()
    axes.annotate(text, tip, at, color=color, arrowprops={"arrowstyle": "->", "color": color})


def _line(axes: Axes, weights: list[float], color: str, label: str, at: At) -> None:
    axes.plot(range(1, STEPS + 1), [100 * weight for weight in weights], color=color, lw=1.6)
    axes.text(*at, label, color=color, linespacing=1.0)


def main() -> None:
    """Run the averages, or draw what they gave."""
    parser = argparse.ArgumentParser(description="The weights of past steps in each average.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="run them, and write this")
    parser.add_argument("--draw", type=Path, metavar="STEM", help="draw results/" + NAME)
    chosen = parser.parse_args()
    if chosen.json is not None:
        found = {name: records.rounded(weights) for name, weights in measure().items()}
        about = environment(torch.device("cpu"))
        records.write(chosen.json, {"environment": about, "steps": STEPS, "weights": found})
    if chosen.draw is not None:
        kept = records.read(records.RESULTS / NAME)["weights"]
        drawing.save(chosen.draw, partial(draw, kept))


if __name__ == "__main__":
    main()
