"""Functions for the hooks of all frameworks: registering classes, unwrapping models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def register_beside(registry: Any, classes: Mapping[str, type]) -> None:
    """Registers each class under its name with ``Fused`` in front, in addition to the original."""
    for name, cls in classes.items():
        registry.register_module(name=f"Fused{name}", force=True, module=cls)


def register_instead(registry: Any, classes: Mapping[str, type]) -> None:
    """Registers each class under the original's name, replacing the original."""
    for name, cls in classes.items():
        registry.register_module(name=name, force=True, module=cls)


def unwrapped(model: nn.Module, is_wrapper: Callable[[nn.Module], bool]) -> nn.Module:
    """The model without a framework's wrapper (DistributedDataParallel, say), if it has one."""
    inner: Any = model.module if is_wrapper(model) else model
    assert isinstance(inner, nn.Module)
    return inner
