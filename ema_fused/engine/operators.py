"""The functions on lists of tensors as operators of torch, for graphs that it compiles.

Eager calls don't pass through them: the dispatcher would take longer than a small update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SCHEMAS = (
    "lerp_(Tensor(a!)[] averaged, Tensor[] source, float weight) -> ()",
    "lerp_.Tensor(Tensor(a!)[] averaged, Tensor[] source, Tensor weight) -> ()",
    "lerp_.ScalarList(Tensor(a!)[] averaged, Tensor[] source, float[] weight) -> ()",
    "lerp_.TensorList(Tensor(a!)[] averaged, Tensor[] source, Tensor[] weight) -> ()",
    "copy_(Tensor(a!)[] averaged, Tensor[] source) -> ()",
    "swap_(Tensor(a!)[] averaged, Tensor(b!)[] source) -> ()",
)

_library = torch.library.Library("ema_fused", "DEF")


def register(**functions: Callable[..., None]) -> None:
    """Registers ``lerp_``, ``copy_`` and ``swap_`` by their eager functions."""
    for schema in _SCHEMAS:
        _library.define(schema)
        name = schema.partition("(")[0]
        _library.impl(name, functions[name.partition(".")[0]], "CompositeExplicitAutograd")
        # Nothing here is recorded by autograd.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ema_fused::{name}", _nothing_is_returned, lib=_library)


def _nothing_is_returned(*_: object) -> None:
    """Shapes are all that a graph is made of, and an update changes none."""


def lerp_(averaged: Sequence[Tensor], source: Sequence[Tensor], weight: Any) -> None:
    of = torch.ops.ema_fused.lerp_
    # Chosen here: torch would take a tensor for a float, and wait for its value.
    if isinstance(weight, Tensor):
        of.Tensor(list(averaged), list(source), weight)
    elif isinstance(weight, Sequence) and any(isinstance(item, Tensor) for item in weight):
        of.TensorList(list(averaged), list(source), list(weight))
    elif isinstance(weight, Sequence):
        of.ScalarList(list(averaged), list(source), list(weight))
    else:
        of.default(list(averaged), list(source), weight)


def copy_(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    torch.ops.ema_fused.copy_.default(list(averaged), list(source))


def swap_(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    torch.ops.ema_fused.swap_.default(list(averaged), list(source))
