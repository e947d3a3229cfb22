"""What LatestWeightAverage should hold: means of weights that a test has recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ema_fused import BaseAveragedModel

Tensors = dict[str, Tensor]


def mean(recorded: list[Tensors], dtype: torch.dtype | None = None) -> Tensors:
    """torch's mean over the recorded weights in float64, rounded.

    Of float64 weights it is the sum from the oldest to the latest: torch's own order is another.
    """
    means = {}
    for name, latest in recorded[-1].items():
        values = [one[name].double() for one in recorded]
        in_turn = torch.stack(values).cumsum(0)[-1] / len(values)
        wide = in_turn if latest.dtype == torch.float64 else torch.stack(values).mean(0)
        means[name] = wide.to(dtype or latest.dtype)
    return means


def parameters(model: nn.Module) -> Tensors:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def held(average: BaseAveragedModel, model: nn.Module) -> Tensors:
    """What is averaged, by the names of the model's parameters."""
    tensors = average.module.state_dict()
    return {name: tensors[name].clone() for name, _ in model.named_parameters()}
