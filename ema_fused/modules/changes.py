"""Finds what was written into a model while averages of another dtype were in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_fused.modules.module_pairs import Pair

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def take_over_changes(pairs: Sequence[Pair], own: Sequence[Tensor]) -> None:
    """Writes into each average the elements of its source that aren't the rounded average any more.

    The others keep the bits that rounding to the source's dtype would lose. Needs the memory of two
    of the largest tensor. Waits once for each device of the averages.

    Args:
        pairs: whose averages were copied into their sources.
        own: what the sources held before. One that has another dtype or shape by now was converted;
            then its elements tell nothing.
    """
    alike = [
        pair
        for pair, kept in zip(pairs, own, strict=True)
        if pair.source.dtype == kept.dtype and pair.source.shape == kept.shape
    ]
    by_device: dict[torch.device, list[Pair]] = {}
    for pair in alike:
        by_device.setdefault(pair.averaged.device, []).append(pair)
    for there in by_device.values():
        flags = torch.stack([_changed(pair).any() for pair in there]).tolist()
        for pair, has_changed in zip(there, flags, strict=True):
            if has_changed:
                averaged = _real(pair.averaged)
                source = _real(pair.source).to(averaged.device, averaged.dtype)
                averaged.copy_(torch.where(_changed(pair), source, averaged))


def _changed(pair: Pair) -> Tensor:
    """One flag for each element: whether it has other bits than the rounded average."""
    source = pair.source.detach()
    put = pair.averaged.detach().to(source.dtype)
    return bits_of(put) != bits_of(source.to(put.device))


def bits_of(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` as integers of their bits; complex ones as pairs."""
    real = _real(tensor)
    return real.view(_BITS[real.dtype.itemsize])


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
