"""Functions of a number or a 0-dim tensor; a tensor is computed on its device, without waiting."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def exp(x: Number) -> Number:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def expm1(x: Number) -> Number:
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def log1p(x: Number) -> Number:
    return torch.log1p(x) if isinstance(x, Tensor) else math.log1p(x)


def cos(x: Number) -> Number:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def raised(x: Number, exponent: float) -> Number:
    return torch.pow(x, exponent) if isinstance(x, Tensor) else math.pow(x, exponent)


def at_least(x: Number, least: float) -> Number:
    return x.clamp(min=least) if isinstance(x, Tensor) else max(x, least)


def at_most(x: Number, most: float) -> Number:
    return x.clamp(max=most) if isinstance(x, Tensor) else min(x, most)


def one_until(x: Number, value: Number) -> Number:
    """``value`` where ``x`` is above 0, else 1."""
    if isinstance(x, Tensor) and isinstance(value, Tensor):
        return torch.where(x > 0, value, torch.ones_like(value))
    return value if x > 0 else 1.0
