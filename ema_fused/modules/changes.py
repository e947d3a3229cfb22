"""Finds what was written into a model while averages of another dtype were in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ema_fused.modules.module_pairs import Pair

_PIECE = 2**20  # elements, or a row if that has more: what is compared takes memory of its own
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def take_over_changes(pairs: Sequence[Pair], own: Sequence[Tensor]) -> None:
    """Writes into each average the elements of its source that aren't the rounded average any more.

    The others keep the bits that rounding to the source's dtype would lose. Needs a few megabytes.
    Waits once for each device of the averages.

    Args:
        pairs: whose averages were copied into their sources.
        own: what the sources held before. One that has another dtype or shape by now was converted;
            then its elements tell nothing. Sparse ones are copied from the model anyway.
    """
    alike = [
        pair
        for pair, kept in zip(pairs, own, strict=True)
        if pair.source.dtype == kept.dtype
        and pair.source.shape == kept.shape
        and pair.source.layout == torch.strided
    ]
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for pair in alike:
        by_device.setdefault(pair.averaged.device, []).extend(_pieces(pair))
    for pieces in by_device.values():
        flags = torch.stack([_changed(*piece).any() for piece in pieces]).tolist()
        for (averaged, source), has_changed in zip(pieces, flags, strict=True):
            if has_changed:
                changed = _changed(averaged, source)
                real = _real(averaged)
                real.copy_(torch.where(changed, _real(source).to(real.device, real.dtype), real))


def _pieces(pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both tensors, cut along their first dimension."""
    averaged, source = pair.averaged.detach(), pair.source.detach()
    if averaged.numel() <= _PIECE:
        yield averaged, source
        return
    rows = max(1, _PIECE * len(averaged) // averaged.numel())
    yield from zip(averaged.split(rows), source.split(rows), strict=True)


def _changed(averaged: Tensor, source: Tensor) -> Tensor:
    """One flag for each element: whether it has other bits than the rounded average."""
    put = averaged.to(source.dtype)
    return bits_of(put) != bits_of(source.to(put.device))


def bits_of(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` as integers of their bits; complex ones as pairs."""
    real = _real(tensor)
    return real.view(_BITS[real.dtype.itemsize])


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
