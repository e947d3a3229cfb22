"""Trainings of Lightning's trainer with one of both callbacks, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ema_fused.callbacks import lightning as ours
from tests.frameworks.callbacks.lightning_run import Digits, held_out, trainer, training

STATES = ("state_dict", "current_model_state", "averaging_state")
QUIET = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and intervals
BOTH = pytest.mark.parametrize("kind", [theirs, ours], ids=["theirs", "ours"])


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=False)
    return checkpoint


def loss_of(state: dict[str, Tensor]) -> float:
    model = Digits().eval()
    model.load_state_dict(state)
    images, labels = next(iter(held_out()))
    with torch.no_grad():
        return float(cross_entropy(model.network(images), labels))


class Scores(Callback):
    """The metrics of each validation."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["val_loss"]))


class Calls(Callback):
    """Calls a function at one moment of the training."""

    def __init__(self, moment: str, function: Callable[[Any, Any], Any]) -> None:
        setattr(self, moment, lambda trainer, pl_module, *_, **__: function(trainer, pl_module))


def fit(folder: Path, callbacks: list[Any], model: Any = None, **arguments: Any) -> Any:
    """A trained trainer; its model is ``trainer.lightning_module``."""
    resume = arguments.pop("ckpt_path", None)
    fitting = trainer(folder, callbacks, **{"max_epochs": 1} | arguments)
    model = Digits() if model is None else model
    fitting.fit(model, training(), held_out(), ckpt_path=resume, weights_only=False)
    return fitting


def ema(kind: Any, **arguments: Any) -> Any:
    """The callback with the same arithmetic in both."""
    return kind.WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8), **arguments)


def saving(folder: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", **{"save_top_k": -1} | arguments)


class Climbing(LightningModule):
    """Its one weight is the number of steps; validation reports it."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(()))
        self.count = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in [self.optimizers()] if self.count == 1 else self.optimizers():
            self.weight.grad = -torch.ones(())
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.weight)

    test_step = validation_step

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(self.count)]
