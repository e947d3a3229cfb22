"""A training of digits under Lightning's trainer; as a script, one that kills itself or resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ema_fused.callbacks.lightning import EMAWeightAveraging
from tests.digits import digits
from tests.processes import die, run_as_asked

BATCHES = 8  # an epoch


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Digits(LightningModule):
    """A learning rate so high that raw and averaged weights differ in what they score."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images.to(self.dtype)), labels)

    def _score(self, name: str, batch: Any) -> None:
        images, labels = batch
        self.log(name, cross_entropy(self.network(images.to(self.dtype)).float(), labels))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._score("val_loss", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._score("test_loss", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(batch[0].to(self.dtype))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.3, momentum=0.9)


class Batches:
    """Images in an order that changes with the epoch; can be resumed in the middle of one."""

    def __init__(self, first: int = 0, count: int = BATCHES, size: int = 16) -> None:
        self.images, self.labels = digits(first, first + count * size)
        self.count = count
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(self.epoch)
        batches = torch.randperm(len(self.labels), generator=random).chunk(self.count)
        for number in range(self.position, self.count):
            self.position = number + 1
            if self.position == self.count:
                self.epoch, self.position = self.epoch + 1, 0
            yield self.images[batches[number]], self.labels[batches[number]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def training() -> Batches:
    return Batches()


def held_out() -> Batches:
    return Batches(first=1000, count=1, size=64)


def trainer(folder: Path, callbacks: list[Any], **arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "num_sanity_val_steps": 1,
        "callbacks": callbacks,
    }
    return Trainer(**quiet | arguments)


class KillAt(Callback):
    """Ends the process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            die()


def run(folder: Path, *, kill_at: int | None = None, resume: bool = False) -> None:
    """Three epochs with a checkpoint after every second step; ``end.pt`` at the end."""
    average = EMAWeightAveraging(decay=0.8, update_every_n_steps=3, update_starting_at_epoch=1)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks: list[Any] = [average, saving]
    if kill_at is not None:
        callbacks.append(KillAt(kill_at))
    saved = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    newest = saved[-1] if resume else None
    model = Digits()
    fitting = trainer(folder, callbacks, max_epochs=3, val_check_interval=4)
    fitting.fit(model, training(), held_out(), ckpt_path=newest, weights_only=False)
    torch.save({"model": model.state_dict(), "step": fitting.global_step}, folder / "end.pt")


if __name__ == "__main__":
    run_as_asked(run)
