"""What a type checker must accept of the averages and what not; checked, never run."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ema_fused import (
    AveragedWeights,
    BiasCorrectedEMA,
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    PowerFunctionEMA,
    StochasticWeightAverage,
)
from ema_fused.averages.options import Options


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().float() for name, weight in model.named_parameters()}


def is_wide(name: str, tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32


def every_option() -> Options:
    return {
        "interval": 1,
        "device": "cpu",
        "update_buffers": [r"running_", re.compile("bias")],
        "averaged_dtype": torch.float32,
        "share_frozen": True,
        "begin_step": 2,
        "backend": "foreach",
        "rounding": "nearest",
        "seed": 1,
        "every": 2,
        "offload": None,
        "overlap": False,
        "capturable": False,
        "distance_every": 3,
        "version_counters": None,
        "skip_nonfinite": False,
        "include": is_wide,
        "exclude": r"router",
    }


def accepted(model: nn.Module) -> None:
    options = every_option()
    StochasticWeightAverage(model, **options)
    ExponentialMovingAverage(model, {r"^head\.": 0.01, "": 0.001}, **options)
    MomentumAnnealingEMA(model, 0.001, 100, **options)
    ExpMomentumEMA(model, 0.001, 2000, **options)
    CosineEMA(model, 0.004, 0.0, max_iters=10, **options)
    AveragedWeights(model, 0.001, source=masters, arithmetic="delta", **options)
    AveragedWeights(model, 0.001, source=masters(model), **options)
    BiasCorrectedEMA(model, source=masters, **options)
    BiasCorrectedEMA(model, 0.5, 0.2, source=masters(model), **options)
    PowerFunctionEMA(model, 0.1, include=is_wide, exclude=["router"], update_buffers=r"running_")


def refused(model: nn.Module) -> None:
    ExponentialMovingAverage(model, source=masters)  # type: ignore[call-arg]
    StochasticWeightAverage(model, intervall=2)  # type: ignore[call-arg]
    ExponentialMovingAverage(model, decay=0.999)  # type: ignore[call-arg]
    AveragedWeights(model, source=3)  # type: ignore[arg-type]
    BiasCorrectedEMA(model, source="weights")  # type: ignore[arg-type]
    BiasCorrectedEMA(model, include=3)  # type: ignore[arg-type]
    PowerFunctionEMA(model, sigmas=0.1)  # type: ignore[call-arg]
    PowerFunctionEMA(model, sigma_rel="wide")  # type: ignore[arg-type]
