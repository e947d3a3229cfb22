"""Train a small network on scikit-learn's digits and keep two averaged copies of its weights.

    python examples/digits.py [--epochs 25] [--seeds 3] [--output digits.png] [--quick]

Where torch sees a GPU it trains there, else on the CPU. ``train`` is an ordinary training loop with
two lines of ours for each average, marked (1) and (2).
The rest of the file reports: test accuracy of the raw, the EMA and the SWA weights, what one
averaged update costs beside one training step and beside the other ways to do it, and a picture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ema_fused import ExponentialMovingAverage, StochasticWeightAverage

# A high learning rate that is never lowered, small batches and noise on the pixels: the weights
# keep jumping about a good place without settling there. That is when an average is worth having.
LEARNING_RATE = 0.2
BATCH_SIZE = 16
PIXEL_NOISE = 0.3  # standard deviation; pixels run from 0 to 1, and test images stay clean
MOMENTUM = 0.01  # of the EMA: it looks back over about 100 steps, or two epochs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Curves = dict[str, list[float]]  # test accuracy in percent after each epoch, by kind of weights
KINDS = ("raw", "EMA", "SWA")


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 images of 8 x 8 pixels, split at random into halves: training and test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=DEVICE).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, device=DEVICE)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    halves = order.chunk(2)
    return TensorDataset(images[halves[0]], labels[halves[0]]), TensorDataset(
        images[halves[1]], labels[halves[1]]
    )


def build_network() -> nn.Sequential:
    """Three 3 x 3 convolutions with batch norm, an average over space, a linear classifier."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    network = nn.Sequential(
        *block(1, 16),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return network.to(DEVICE)


def train(seed: int, epochs: int, progress: Callable[[], object]) -> Curves:
    """Train one network; the test accuracy of its raw and averaged weights after each epoch."""
    torch.manual_seed(seed)
    training, test = load_data(seed)
    batches = DataLoader(training, BATCH_SIZE, shuffle=True, drop_last=True)
    model = build_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    # update_buffers=True averages batch norm's running statistics along with the weights. Left
    # False, the averaged weights would run with the statistics of the last raw weights: measured
    # here over the last six epochs, that costs the EMA 0.5 points of accuracy and SWA 9.
    ema = ExponentialMovingAverage(model, momentum=MOMENTUM, update_buffers=True)  # (1)
    swa = StochasticWeightAverage(model, update_buffers=True)  # (1)
    swa_start = epochs // 4  # SWA weighs all steps alike, so it leaves out the first ones

    curves: Curves = {kind: [] for kind in KINDS}
    for epoch in range(epochs):
        model.train()
        for images, labels in batches:
            noisy = images + PIXEL_NOISE * torch.randn_like(images)
            loss = cross_entropy(model(noisy), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)  # (2)
            if epoch >= swa_start:
                swa.update_parameters(model)  # (2)

        curves["raw"].append(accuracy(model, test))
        with ema.swapped(model):
            curves["EMA"].append(accuracy(model, test))
        if epoch >= swa_start:
            with swa.swapped(model):
                curves["SWA"].append(accuracy(model, test))
        else:
            curves["SWA"].append(float("nan"))  # it has no average yet
        progress()
    return curves


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Percent of the test images that the model names right."""
    images, labels = test.tensors
    model.eval()
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())


# What follows measures and reports; nothing of it is needed to use an average.


def updates(model: nn.Module) -> dict[str, tuple[Callable[[], object], list[Tensor]]]:
    """Four ways to move an average of the model: the update, and the tensors that it moves.

    All do the same work: floating-point parameters and buffers averaged, integer buffers copied
    (torch's AveragedModel averages those too, rounding down). The two by hand use lists that were
    put together beforehand and never look at the model again.
    """
    ours = ExponentialMovingAverage(model, momentum=MOMENTUM, update_buffers=True)
    average_all = get_ema_multi_avg_fn(1 - MOMENTUM)
    torchs = AveragedModel(model, multi_avg_fn=average_all, use_buffers=True)
    source = _state(model)
    floats = [i for i, tensor in enumerate(source) if tensor.is_floating_point()]
    others = [i for i, tensor in enumerate(source) if not tensor.is_floating_point()]
    by_foreach = [tensor.clone() for tensor in source]
    by_loop = [tensor.clone() for tensor in source]
    float_lists = [by_foreach[i] for i in floats], [source[i] for i in floats]
    other_lists = [by_foreach[i] for i in others], [source[i] for i in others]

    def foreach() -> None:
        torch._foreach_lerp_(*float_lists, MOMENTUM)
        torch._foreach_copy_(*other_lists)

    def loop() -> None:
        for averaged, new in zip(by_loop, source, strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(new, MOMENTUM)
            else:
                averaged.copy_(new)

    ours.update_parameters(model)  # the first update of these two copies; later ones average
    torchs.update_parameters(model)
    return {
        "ema_fused, update_parameters": (
            lambda: ours.update_parameters(model),
            _state(ours.module),
        ),
        "torch._foreach_lerp_ by hand": (foreach, by_foreach),
        "torch AveragedModel, foreach": (
            lambda: torchs.update_parameters(model),
            _state(torchs.module),
        ),
        "a loop of lerp_ by hand": (loop, by_loop),
    }


def _state(model: nn.Module) -> list[Tensor]:
    """Parameters, then buffers, detached and in the model's order."""
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def measure_costs(rounds: int) -> dict[str, float]:
    """Median seconds of one training step and of each kind of update, measured in turns.

    On a GPU until the device is done with them.
    """
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else _nothing
    torch.manual_seed(0)
    model = build_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    images, labels = (tensor[:BATCH_SIZE] for tensor in load_data(0)[0].tensors)

    def training_step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    calls: dict[str, Callable[[], object]] = {"one training step": training_step}
    calls |= {name: update for name, (update, _) in updates(model).items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            repeats = 5 if call is training_step else 50
            with torch.set_grad_enabled(call is training_step):
                wait()
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                wait()
                seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(samples) for name, samples in seconds.items()}


def _nothing() -> None:
    pass


def device_name() -> str:
    """What it is trained on, for the head of a table."""
    return torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "the CPU"


def accuracy_table(runs: list[Curves]) -> str:
    """Mean and standard deviation over seeds, after the last epoch and over the last quarter."""
    epochs = len(runs[0]["raw"])
    tail = max(1, epochs // 4)
    rows: list[tuple[str, ...]] = [
        ("weights", "after the last epoch", f"mean of epochs {epochs - tail + 1} to {epochs}")
    ]
    for kind in KINDS:
        curves = np.array([run[kind] for run in runs])
        rows.append((kind, *map(_mean_and_spread, (curves[:, -1], curves[:, -tail:].mean(axis=1)))))
    return _aligned(rows)


def _mean_and_spread(values: np.ndarray) -> str:
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.2f} ± {spread:.2f} %"


def cost_table(costs: dict[str, float]) -> str:
    """Each update's median time, its share of a training step, and its ratio to ours."""
    (_, step), (_, ours), *_ = costs.items()
    rows: list[tuple[str, ...]] = [("", "median", "share of a step", "ratio to ours")]
    for name, seconds in costs.items():
        ratio = "" if seconds == step else f"{seconds / ours:.2f}"
        rows.append((name, f"{seconds * 1e6:.1f} us", f"{100 * seconds / step:.2f} %", ratio))
    return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns of plain text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("   ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def draw(runs: list[Curves], path: Path) -> None:
    """Accuracy over epochs: the mean over seeds as a line, lowest to highest as a band."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, len(runs[0]["raw"]) + 1)
    for kind, colour in zip(KINDS, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        curves = np.array([run[kind] for run in runs])
        known = ~np.isnan(curves[0])
        x, curves = epochs[known], curves[:, known]
        axes.plot(x, curves.mean(axis=0), color=colour, marker=".", label=kind, zorder=3)
        axes.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.18)
    # The first epochs may fall off the bottom; where every curve ends is always seen.
    bottom = min(90.0, *(run[kind][-1] - 1 for run in runs for kind in KINDS))
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(bottom, 100))
    axes.set_title("Digits: raw and averaged weights (mean over seeds, band lowest to highest)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def at_least_one(text: str) -> int:
    """The whole number in a command's argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> None:
    """Train for every seed, measure the updates, print both tables, draw the picture."""
    parser = argparse.ArgumentParser(description="Averaged weights on scikit-learn's digits.")
    parser.add_argument("--epochs", type=at_least_one, help="of each training (default: 25)")
    parser.add_argument("--seeds", type=at_least_one, help="trainings to run (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="8 epochs and 2 seeds unless given")
    options = parser.parse_args()
    epochs = options.epochs or (8 if options.quick else 25)
    seeds = options.seeds or (2 if options.quick else 3)

    # On so small a network two threads are hardly faster than one, and far slower when others
    # keep the machine busy.
    torch.set_num_threads(1)
    with tqdm(total=epochs * seeds, unit="epoch", desc="training") as bar:
        runs = [train(seed, epochs, bar.update) for seed in range(seeds)]
    costs = measure_costs(rounds=10 if options.quick else 60)
    draw(runs, options.output)

    print(f"\nTrained on {device_name()} (seeds: {seeds}, epochs: {epochs}).")
    print("\nTest accuracy, mean ± standard deviation:\n")
    print(accuracy_table(runs))
    print("\nThe cost of one averaged update, medians measured in turns:\n")
    print(cost_table(costs))
    print(f"\nAccuracy over epochs: {options.output}")


if __name__ == "__main__":
    main()
