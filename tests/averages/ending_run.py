"""Averages and models that live until the interpreter has taken the modules' globals apart.

So they do in a script whose module something still refers to: its globals, the first of all, are
taken apart last, in the order that they were made in.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from ema_fused import (
    AveragedWeights,
    BiasCorrectedEMA,
    ExponentialMovingAverage,
    PowerFunctionEMA,
    attach,
)
from ema_fused.adapters import accelerate
from ema_fused.posthoc import power_function

warnings.simplefilter("ignore")


def torchs(model: nn.Module) -> swa_utils.AveragedModel:
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    accelerate(average)
    return average


def attached(model: nn.Module) -> AveragedWeights:
    average = AveragedWeights(model, 0.1, offload="cpu")
    attach(torch.optim.SGD(model.parameters(), lr=0.1), model, average)
    return average


KINDS: list[Callable[[nn.Module], Any]] = [
    lambda model: ExponentialMovingAverage(model, 0.1, exclude="bias"),
    lambda model: AveragedWeights(model, 0.1, source=dict(model.named_parameters())),
    lambda model: AveragedWeights(model, 0.1, offload="cpu"),
    attached,
    BiasCorrectedEMA,
    PowerFunctionEMA,
    torchs,
]


def made() -> tuple[list[nn.Module], list[Any]]:
    """Models of all sorts of averages, which know them by now."""
    models: list[nn.Module] = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in KINDS]
    averages = [kind(model) for kind, model in zip(KINDS, models, strict=True)]
    for average, model in zip(averages, models, strict=True):
        for _ in range(2):
            average.update_parameters(model)
    return models, averages


class Last:
    """Tells, as it goes last, whether what is tested was the case."""

    def __init__(self, write: Callable[[str], object], there: dict[str, Any]) -> None:
        self._write, self._there = write, there

    def __del__(self) -> None:
        self._write(f"PowerFunctionEMA is {self._there['PowerFunctionEMA']}")


if __name__ == "__main__":
    models, averages = made()
    earlier_averages, later_models = reversed(made())
    last = Last(sys.stdout.write, vars(power_function))
    sys.kept = sys.modules["__main__"]  # type: ignore[attr-defined]
