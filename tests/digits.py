"""Real data to train on: scikit-learn's handwritten digits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

_load: Any = functools.cache(load_digits)


def digits(first: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
    """Images of one channel, from 0 to 1, and their labels."""
    images, labels = _load().images[first:end], _load().target[first:end]
    return torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(labels)
