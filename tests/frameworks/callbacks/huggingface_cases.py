"""Averages computed by hand under transformers' Trainer, and what it measures with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from ema_fused.callbacks.huggingface import EMACallback
from tests.frameworks.callbacks.huggingface_run import (
    EVALUATION,
    Digits,
    digits_model,
    digits_trainer,
)
from tests.networks import own

Tensors = dict[str, Tensor]
MOMENTUM = 0.1


class ByHand(TrainerCallback):  # type: ignore[misc]
    """The average in plain torch, and what both kinds of weights were at each evaluation."""

    def __init__(self, momentum: float = MOMENTUM) -> None:
        self.momentum = momentum
        self.average: Tensors = {}
        self.steps = 0
        self.at_evaluations: list[tuple[Tensors, Tensors, dict[str, float]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.before = [parameter.detach().clone() for parameter in rest["model"].parameters()]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if all(map(torch.equal, self.before, rest["model"].parameters())):
            return  # skipped
        self.steps += 1
        for name, new in own(rest["model"]).items():
            if self.steps > 1 and new.is_floating_point():
                self.average[name] = torch.lerp(self.average[name], new, self.momentum)
            else:
                self.average[name] = new

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.at_evaluations.append((own(rest["model"]), dict(self.average), rest["metrics"]))


def averages(callback: EMACallback) -> Tensors:
    assert callback.average is not None
    return own(callback.average.module)


@torch.no_grad()
def metrics_of(weights: Tensors, rows: range = EVALUATION) -> dict[str, float]:
    """What the trainer should have measured with ``weights``."""
    model, digits = digits_model(), Digits(rows)
    model.load_state_dict(weights)
    logits = model.eval()(digits.images)["logits"]
    right = logits.argmax(-1) == digits.labels
    return {
        "eval_loss": float(cross_entropy(logits, digits.labels)),
        "eval_accuracy": float(right.double().mean()),
    }


def assert_measured_with(weights: Tensors, metrics: dict[str, float]) -> None:
    for name, value in metrics_of(weights).items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def attached(folder: Path, *others: Any, **arguments: Any) -> tuple[EMACallback, Trainer]:
    """A callback and its trainer, where nothing special is asked of the average."""
    trainer = digits_trainer(folder, callbacks=list(others), **arguments)
    return EMACallback(momentum=MOMENTUM, update_buffers=True).attach(trainer), trainer
