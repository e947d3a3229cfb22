"""Allocates averages of models built on the meta device, once the model itself is allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.engine.dtensors import local
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.module_pairs import Kind, partners, slots_of


def materialise(averaged: nn.Module, model: nn.Module, shares: FrozenShares) -> None:
    """Replaces the meta tensors of ``averaged`` by copies of their partners in ``model``.

    Tied tensors stay tied. Tensors that are on the meta device in the model too are left alone.

    Raises:
        KeyError: names don't match; nothing has been replaced then.
    """
    ours = slots_of(averaged)
    if not any(local(slot.tensor).is_meta for slot in ours.values()):
        return
    theirs = slots_of(model)
    made: dict[Tensor, Tensor] = {}
    for name, partner in partners(ours, theirs).items():
        tensor, kind, owner, key = ours[name]
        source = theirs[partner].tensor
        if not local(tensor).is_meta or local(source).is_meta:
            continue
        is_parameter = kind is Kind.PARAMETER
        if tensor not in made:
            with torch.inference_mode(False):
                real = shares.average_of(name, source, tensor.dtype)
                made[tensor] = nn.Parameter(real, requires_grad=False) if is_parameter else real
        slots: dict[str, Any] = owner._parameters if is_parameter else owner._buffers
        slots[key] = made[tensor]
