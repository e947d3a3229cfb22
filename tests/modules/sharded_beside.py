"""A model spread over processes beside one of one process with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights
from ema_fused.saving.checkpoints import averaged_state_dict
from tests.sharded_models import perceptron, spread, train, trainer, whole, whole_weights


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in {**one, **other}
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


def state_of(averaged: AveragedWeights, model: nn.Module) -> dict[str, Tensor]:
    return {
        name: whole(tensor)
        for name, tensor in averaged_state_dict(averaged, model, full_state_dict=True).items()
    }


class Beside:
    """A spread model with its average, and the average of the same weights in one process."""

    def __init__(self, way: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.way = way
        self.model = spread(perceptron().to(dtype), way)
        self.optimizer = trainer(self.model)
        options = {"momentum": 0.1, **options}
        self.averaged = AveragedWeights(self.model, **options)
        self.plain = perceptron().to(dtype)
        self.reference = AveragedWeights(self.plain, **options)

    def step(self, number: int) -> None:
        train(self.model, self.optimizer, number, self.way)
        self.averaged.update_parameters(self.model)
        self.plain.load_state_dict(whole_weights(self.model))
        self.reference.update_parameters(self.plain)

    def differing(self) -> list[str]:
        return differing(state_of(self.averaged, self.model), dict(self.reference.state_dict()))
