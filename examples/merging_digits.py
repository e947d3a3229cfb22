"""Merge the last checkpoints of a run at a constant learning rate, beside a run that decays it.

    python examples/merging_digits.py [--epochs 16] [--seeds 3] [--output merging.png] [--quick]

The network and the data are those of ``digits.py``. In the last half of a run a checkpoint is saved
each half epoch; merged by each schedule, they are tested beside the last of them, and beside a run
that went on from the first of them with a decaying rate for as many steps: a run of its own, which
a merge saves. After a merge the statistics of batch norm are measured again.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import digits  # type: ignore[import-not-found]
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ema_fused.merging import merge

SCHEDULES = ("mean", "linear", "minus-sqrt", "ema:0.8", "power:0.1")
LAST, DECAYED = "the last checkpoint", "decayed, a run of its own"
Accuracies = dict[str, float]  # in percent, by what was tested


class Training:
    """A network in training; ``run`` goes on with it.

    Args:
        seed: of the network, of the order of the images and of the noise on them.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.test = digits.load_data(seed)
        self.batches = DataLoader(self.data, digits.BATCH_SIZE, shuffle=True, drop_last=True)
        self.model = digits.build_network()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=digits.LEARNING_RATE, momentum=0.9
        )
        self.steps = 0

    def run(self, steps: int, rate: Callable[[float], float] = lambda _: 1.0) -> None:
        """Trains for so many steps; ``rate``, of the part of them that is done, scales the rate."""
        self.model.train()
        for step, (images, labels) in enumerate(islice(_for_ever(self.batches), steps)):
            self.optimizer.param_groups[0]["lr"] = digits.LEARNING_RATE * rate(step / steps)
            loss = cross_entropy(self.model(_noisy(images)), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.steps += steps

    def accuracy(self) -> float:
        return float(digits.accuracy(self.model, self.test))


def _for_ever(batches: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    while True:
        yield from batches


def _noisy(images: Tensor) -> Tensor:
    return images + torch.randn_like(images) * float(digits.PIXEL_NOISE)


def minus_sqrt(x: float) -> float:
    """The rate that is left after a part ``x`` of a decay."""
    return 1 - math.sqrt(x)


def compare(seed: int, epochs: int, folder: Path) -> tuple[Accuracies, dict[str, list[float]]]:
    """Trains, merges and tests; also the weights that each schedule gave the checkpoints."""
    training = Training(seed)
    half = len(training.batches) // 2
    training.run(epochs * half)
    decayed = copy.deepcopy(training)
    torch.save(training.model.state_dict(), folder / f"step-{training.steps}.pt")
    for _ in range(epochs):
        training.run(half)
        torch.save(training.model.state_dict(), folder / f"step-{training.steps}.pt")
    decayed.run(epochs * half, minus_sqrt)

    found = {LAST: training.accuracy()}
    weights = {}
    for schedule in SCHEDULES:
        weights[schedule] = merge_into(training.model, folder, schedule)
        torch.manual_seed(seed)  # for each the same images, and the same noise on them
        update_bn((_noisy(images) for images, _ in training.batches), training.model)
        found[schedule] = training.accuracy()
    found[DECAYED] = decayed.accuracy()
    return found, weights


def merge_into(model: nn.Module, folder: Path, schedule: str) -> list[float]:
    """Gives the model the merge of all checkpoints in the folder; their weights."""
    output = folder.parent / "merged.pt"
    with warnings.catch_warnings():
        # They are measured again, by the caller.
        warnings.filterwarnings("ignore", message=".*statistics of batch norm")
        record = merge(folder, output=output, schedule=schedule)
    model.load_state_dict(torch.load(output, weights_only=True))
    return [one.weight for one in record.inputs]


def table(runs: Sequence[Accuracies]) -> str:
    """Mean and standard deviation of the test accuracy over seeds."""
    lines = []
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        lines.append(f"{name:<28} {values.mean():6.2f} ± {spread:.2f} %")
    return "\n".join(lines)


def draw(runs: Sequence[Accuracies], weights: dict[str, list[float]], path: Path) -> None:
    """Left what each seed reached, right the weights of the checkpoints."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    reached, weighed = figure.subplots(1, 2)
    for place, name in enumerate(runs[0]):
        values = [run[name] for run in runs]
        colour = "tab:blue" if name in SCHEDULES else "tab:gray"
        reached.plot(values, [place] * len(values), "o", color=colour, alpha=0.5)
        reached.plot([np.mean(values)], [place], "|", color=colour, markersize=22)
    reached.set_yticks(range(len(runs[0])), list(runs[0]))
    reached.invert_yaxis()
    reached.set(xlabel="test accuracy (%)", title="Each seed, and their mean")
    reached.grid(alpha=0.3)
    for schedule, one in weights.items():
        weighed.plot(range(1, len(one) + 1), one, marker=".", label=schedule)
    weighed.set(xlabel="checkpoint, the oldest first", title="Weights of the checkpoints")
    weighed.grid(alpha=0.3)
    weighed.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Compare for every seed, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description="Merged checkpoints on scikit-learn's digits.")
    parser.add_argument("--epochs", type=digits.at_least_one, help="of each training (default: 16)")
    parser.add_argument("--seeds", type=digits.at_least_one, help="trainings to run (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("merging.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="4 epochs and 1 seed unless given")
    options = parser.parse_args()
    epochs = options.epochs or (4 if options.quick else 16)
    seeds = options.seeds or (1 if options.quick else 3)

    torch.set_num_threads(1)  # on so small a network, as fast as two
    runs = []
    weights: dict[str, list[float]] = {}
    for seed in tqdm(range(seeds), unit="training"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "run")
            folder.mkdir()
            found, weights = compare(seed, epochs, folder)
        runs.append(found)
    draw(runs, weights, options.output)
    print(f"\n{seeds} seeds, {epochs} epochs, {epochs + 1} checkpoints of the second half.\n")
    print("Test accuracy, mean ± standard deviation:\n")
    print(table(runs))
    print(f"\nAs a picture: {options.output}")


if __name__ == "__main__":
    main()
