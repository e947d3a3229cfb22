"""What the hooks of all frameworks share: registering their classes, unwrapping models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def register_beside(registry: Any, classes: Mapping[str, type]) -> None:
    """Registers each class as ``Fused`` and its name, so that both can be used in one process."""
    for name, cls in classes.items():
        registry.register_module(name=f"Fused{name}", force=True, module=cls)


def register_instead(registry: Any, classes: Mapping[str, type]) -> None:
    """Registers each class under its original's name, in the original's place."""
    for name, cls in classes.items():
        registry.register_module(name=name, force=True, module=cls)


def unwrapped(model: nn.Module, is_wrapper: Callable[[nn.Module], bool]) -> nn.Module:
    """The model itself where a framework has wrapped it (in DistributedDataParallel, say)."""
    inner: Any = model.module if is_wrapper(model) else model
    assert isinstance(inner, nn.Module)
    return inner
