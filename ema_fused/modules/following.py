"""Buffers that are copies of the model's take its shapes over, and new ones join them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.engine.dtensors import is_sharded
from ema_fused.modules.choosing import Buffers
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.module_pairs import (
    Kind,
    Slot,
    has_average,
    is_averaged,
    numbers_of,
    own_in,
    slots_of,
)
from ema_fused.modules.naming import common_names, plain_path
from ema_fused.modules.sharding import converted


@contextmanager
def following_buffers(
    averaged: nn.Module, model: nn.Module, *, update_buffers: Buffers, shares: FrozenShares
) -> Iterator[bool]:
    """Makes buffers of ``averaged`` anew that only follow the model's; undone if the block raises.

    Nothing is averaged in them, so nothing is lost. Those of another shape get the model's (the
    observers of quantization-aware training find theirs in the first batches), and persistent ones
    that the model has registered since are added. One that the model has lost stays, and its names
    don't match: the copy may need it, so that is for ``adopt`` to decide.

    Args:
        update_buffers: which floating-point buffers are averaged, and so don't follow.
        shares: tells where new buffers belong.

    Yields:
        Whether there were any.
    """
    changed: list[tuple[dict[str, Tensor | None], str, Tensor | None, bool]] = []
    ours, theirs = slots_of(averaged), slots_of(model)
    common = common_names(ours, theirs)
    with torch.inference_mode(False):
        for name, partner in common.items():
            slot, source = ours[name], theirs[partner]
            if _follows(partner, source, update_buffers) and _differs_in_shape(slot, source):
                new = converted(source.tensor, slot.tensor.device, slot.tensor.dtype)
                _put(new, slot.owner, slot.key, changed)
        parts = {plain_path(path): part for path, part in averaged.named_modules()}
        known = set(common.values()) | own_in(ours, theirs)
        for partner in (name for name in theirs if name not in known):
            source, path = theirs[partner], partner.rpartition(".")[0]
            owner = parts.get(plain_path(path))
            # An ordinary attribute of that name would hide it.
            is_free = owner is not None and source.key not in vars(owner)
            if owner is not None and is_free and _follows(partner, source, update_buffers):
                new = shares.average_of(partner, source.tensor, None)
                _put(new, owner, source.key, changed)
    try:
        yield bool(changed)
    except BaseException:
        for buffers, key, before, was_there in reversed(changed):
            if was_there:
                buffers[key] = before
            else:
                del buffers[key]
        raise


def _follows(name: str, source: Slot, update_buffers: Buffers) -> bool:
    tensor = source.tensor
    if source.kind is not Kind.BUFFER or is_lazy(tensor) or is_sharded(tensor):
        return False
    return not (is_averaged(name, source, update_buffers) and has_average(tensor))


def _differs_in_shape(slot: Slot, source: Slot) -> bool:
    if slot.kind is not Kind.BUFFER or is_lazy(slot.tensor):
        return False
    alike = numbers_of(slot.tensor) == numbers_of(source.tensor)
    return alike and slot.tensor.shape != source.tensor.shape


def _put(
    new: Tensor,
    owner: nn.Module,
    key: str,
    changed: list[tuple[dict[str, Tensor | None], str, Tensor | None, bool]],
) -> None:
    buffers = owner._buffers
    changed.append((buffers, key, buffers.get(key), key in buffers))
    buffers[key] = new
