"""Trains on digits with accelerate and an average of ours; the tests import it, and run it.

As a script it leaves ``end.pt``: the tensors of the model and of the average.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ema_fused import ExponentialMovingAverage
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.callbacks.accelerate import update_average
from tests.digits import digits
from tests.processes import die, run_as_asked

EPOCHS = 3


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 10),
    )


class Training:
    """Ten batches an epoch, three to a step: 3 + 3 + 3 + 1."""

    def __init__(self, accelerator: Accelerator | None = None, **optimizer_options: Any) -> None:
        set_seed(0)
        self.accelerator = accelerator or Accelerator(cpu=True, gradient_accumulation_steps=3)
        self.plain_model = network()
        self.average: BaseAveragedModel = ExponentialMovingAverage(
            self.plain_model, momentum=0.1, update_buffers=True
        )
        batches = DataLoader(TensorDataset(*digits(0, 480)), 48)
        optimizer = torch.optim.AdamW(self.plain_model.parameters(), lr=0.01, **optimizer_options)
        self.model, self.optimizer, self.batches = self.accelerator.prepare(
            self.plain_model, optimizer, batches
        )
        self.accelerator.register_for_checkpointing(self.average)

    def epoch(self, start: int = 0) -> Iterator[tuple[int, bool]]:
        """Trains batch by batch; gives the batch's number and whether the average was updated."""
        self.model.train()
        batches = self.accelerator.skip_first_batches(self.batches, start)
        for number, (images, labels) in enumerate(batches, start):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(cross_entropy(self.model(images), labels))
                self.optimizer.step()
                self.optimizer.zero_grad()
                yield number, update_average(self.accelerator, self.average, self.model)


def run(folder: Path, *, kill_at: int | None = None, resume: bool = False) -> Path:
    """A checkpoint follows the sixth batch of the second epoch, after a step of the optimizer."""
    training = Training()
    first, start = 0, 0
    if resume:
        training.accelerator.load_state(str(folder / "checkpoint"))
        first, start = 1, 6
    for epoch in range(first, EPOCHS):
        for batch, _ in training.epoch(start):
            if (epoch, batch) == (1, 5):
                training.accelerator.save_state(str(folder / "checkpoint"))
            if kill_at == 10 * epoch + batch:
                die()
        start = 0
    end = {"model": training.plain_model.state_dict(), "average": training.average.state_dict()}
    torch.save(end, folder / "end.pt")
    return folder / "end.pt"


if __name__ == "__main__":
    run_as_asked(run)
