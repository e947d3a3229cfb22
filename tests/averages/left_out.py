"""Averages of a network of which a part is left out, and what is to be true of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ema_fused import AveragedWeights, CosineEMA, ExponentialMovingAverage
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import StochasticWeightAverage

HEAD = {"head.weight", "head.bias"}
KINDS = [ExponentialMovingAverage, AveragedWeights]


class OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


def make(kind: Any, model: nn.Module, **options: Any) -> Any:
    arguments: dict[str, Any] = {"momentum": 0.25}
    if kind in (StochasticWeightAverage, OneByOne):
        arguments = {}
    elif kind is CosineEMA:
        arguments["max_iters"] = 9
    return kind(model, **arguments, **options)


def parameters(averaged: BaseAveragedModel) -> dict[str, Tensor]:
    return dict(averaged.module.named_parameters())


def expect_shared(averaged: BaseAveragedModel, model: nn.Module, names: set[str]) -> None:
    ours, theirs = parameters(averaged), dict(model.named_parameters())
    shared = {name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == names == averaged.shared_names == set(averaged.left_out_names)
