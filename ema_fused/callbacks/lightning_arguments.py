"""The arguments of Lightning's ``WeightAveraging``."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["check_arguments"]


def check_arguments(device: object, use_buffers: object, kwargs: dict[str, Any]) -> None:
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int, type(None))):
        raise TypeError(f"device is {device!r}; a torch.device, its name or its index is expected")
    if not isinstance(use_buffers, bool):
        raise TypeError(f"use_buffers is {use_buffers!r}; True or False is expected")
    functions = {"avg_fn", "multi_avg_fn"}
    if unknown := kwargs.keys() - functions:
        raise TypeError(
            f"WeightAveraging got {', '.join(sorted(unknown))}; apart from device and use_buffers "
            f"it takes avg_fn or multi_avg_fn"
        )
    given = {name: function for name, function in kwargs.items() if function is not None}
    for name, function in given.items():
        if not callable(function):
            raise TypeError(f"{name} is {function!r}; a function is expected")
    if len(given) > 1:
        raise ValueError("avg_fn and multi_avg_fn are both given; only one of them may be set")
