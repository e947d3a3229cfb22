"""Trains on digits with transformers' Trainer and our callback; the tests import it, and run it.

As a script it leaves ``end.pt``: the tensors of model and average, and what was logged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ema_fused.callbacks.huggingface import EMACallback
from tests.digits import digits
from tests.processes import die, run_as_asked

TRAINING, EVALUATION = range(0, 480), range(1000, 1400)


class DigitsConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "digits"

    def __init__(self, channels: int = 6, **rest: Any) -> None:
        super().__init__(**rest)
        self.channels = channels


class DigitsModel(PreTrainedModel):  # type: ignore[misc]
    """Convolution, batch norm, dropout, linear."""

    config_class = DigitsConfig

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        self.conv = nn.Conv2d(1, config.channels, 3, stride=2)
        self.norm = nn.BatchNorm2d(config.channels)
        self.head = nn.Linear(config.channels * 9, 10)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        features = self.norm(self.conv(images.to(self.dtype))).relu().flatten(1)
        logits = self.head(nn.functional.dropout(features, 0.1, self.training))
        return (
            {"logits": logits}
            if labels is None
            else {
                "loss": cross_entropy(logits, labels),
                "logits": logits,
            }
        )


class Digits(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: range) -> None:
        self.images, self.labels = digits(rows.start, rows.stop)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"images": self.images[row], "labels": self.labels[row]}


class KillAt(TrainerCallback):  # type: ignore[misc]
    """Ends the process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step:
            die()


def accuracy(results: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(results.predictions, -1) == results.label_ids).mean())}


def digits_model(seed: int = 0) -> DigitsModel:
    torch.manual_seed(seed)
    return DigitsModel(DigitsConfig())


def digits_trainer(
    folder: Path,
    *,
    model: nn.Module | None = None,
    callbacks: list[Any] | None = None,
    trainer_class: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    """10 batches an epoch, of SGD with a high learning rate."""
    options = {
        "per_device_train_batch_size": 48,
        "per_device_eval_batch_size": 200,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_steps": 12,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return trainer_class(
        model=digits_model() if model is None else model,
        args=TrainingArguments(str(folder), **{**options, **arguments}),
        train_dataset=Digits(TRAINING),
        eval_dataset=Digits(EVALUATION),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def run(
    folder: Path, *, kill_at: int | None = None, resume: bool | str = False, **average: Any
) -> Path:
    """Checkpoints come within epochs, and evaluations between checkpoints."""
    trainer = digits_trainer(
        folder,
        callbacks=[KillAt(kill_at)] if kill_at else None,
        optim="adamw_torch",
        learning_rate=0.01,
        gradient_accumulation_steps=3,  # the 10 batches of an epoch make 4 steps: 3 + 3 + 3 + 1
        max_steps=15,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=5,
    )
    callback = EMACallback(momentum=0.1, update_buffers=True, **average).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    assert callback.average is not None
    end = {
        "model": trainer.model.state_dict(),
        "average": callback.average.state_dict(),
        "losses": {
            line["step"]: line["eval_loss"]
            for line in trainer.state.log_history
            if "eval_loss" in line
        },
    }
    torch.save(end, folder / "end.pt")
    return folder / "end.pt"


if __name__ == "__main__":
    run_as_asked(run)
