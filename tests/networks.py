"""Small networks for the tests of averaged models, and what happens to them in training."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.engine import backends

# Backends that serve CPU tensors here. None takes the best for each tensor, as users do.
CPU_BACKENDS = [None] + [name for name in ("foreach",) if backends.pinned(None) != name]


class ConvNet(nn.Module):
    """Convolution, batch norm and odd sizes: vectors and tails, float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5, 67, bias=False)
        self.head = nn.Linear(67, 31)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.head(self.hidden(features).relu()) * self.scale


class Weight(nn.Module):
    """One parameter with one element."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def set_to(self, value: float) -> Weight:
        with torch.no_grad():
            self.weight.fill_(value)
        return self


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight


class Cached(nn.Module):
    """A layer with a cache: a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.cache: Tensor | None
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def conv_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet().to(dtype)


@torch.no_grad()
def train(model: nn.Module, generator: torch.Generator) -> None:
    """One step of something like training: floats move a little, counters count."""
    for parameter in model.parameters():
        step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(step.to(parameter.dtype), alpha=0.1)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
        else:
            buffer.add_(1)


def overflow_at(parameter: Tensor, steps: set[int]) -> None:
    """Makes gradients infinite at some steps, as half precision does."""
    count = itertools.count()
    parameter.register_hook(lambda grad: grad * math.inf if next(count) in steps else grad)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(averaged: BaseAveragedModel, model: nn.Module, steps: int, seed: int = 0) -> None:
    """Trains ``model`` and takes it into its average, ``steps`` times."""
    random = generator(seed)
    for _ in range(steps):
        train(model, random)
        averaged.update_parameters(model)


def values_of(averaged: BaseAveragedModel, sources: list[float]) -> list[float]:
    """The averaged weight after each update by a model whose weight is the next of ``sources``."""
    model = Weight()
    values = []
    for source in sources:
        averaged.update_parameters(model.set_to(source))
        values.append(averaged.module.weight.item())
    return values


def bits(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bits, row by row: a NaN is itself, as in padding that nobody has set."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return torch.atleast_1d(copied).view(torch.uint8)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in ``module``, non-persistent buffers too."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def own(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what ``state_dict`` gives."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same to the bit, or on one side only."""
    return [
        name
        for name in {**one, **other}
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or not torch.equal(one[name], other[name])
    ]


def floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def assert_equal_for(steps: int, model: nn.Module, our: Any, their: Any, seed: int = 0) -> None:
    """Trains on, updating both, and compares all that the original averages or copies."""
    random = generator(seed)
    for step in range(steps):
        train(model, random)
        our.update_parameters(model)
        their.update_parameters(model)
        assert our.steps == their.steps
        found, expected = snapshot(our), snapshot(their)
        if their.update_buffers:  # originals leave integer buffers where they were
            found, expected = floating(found), floating(expected)
        assert differences(found, expected) == [], f"after call {step}"
