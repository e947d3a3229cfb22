"""Weighted sums in tiles that stay in the processor's cache.

A tile is widened, summed over all inputs and rounded once before the next one is touched, so memory
moves each input once and the result once. torch's own operations do that: below 32,768 elements
they run on the calling thread, and beside the reading threads that is what is wanted. (On two cores
they sum 1.7 to 3.5 GB/s of inputs, about as much as one thread copies from the page cache; a kernel
of our own would wait for the files.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ema_fused.engine.plan import Plan
from ema_fused.engine.rounding import HALVES

TILE = 32768


def wide_dtype(dtype: torch.dtype, *, float64: bool) -> torch.dtype:
    """The dtype that tensors of ``dtype`` are summed in."""
    if dtype.is_complex:
        is_wide = float64 or dtype == torch.complex128
        return torch.complex128 if is_wide else torch.complex64
    return torch.float64 if float64 or dtype == torch.float64 else torch.float32


class WeightedSum:
    """Sums tensors of one dtype with fixed weights; keeps its tiles.

    ``W x0 + w1 (x1 - x0) + w2 (x2 - x0) + ...``, W being the sum of the weights: rounding errors
    are relative to how much the inputs differ, and what is equal in all of them (frozen weights)
    comes out equal to the bit when W is 1.

    Args:
        weights: one per input.
        wide: the dtype to sum in.
        out: the dtype of the result.
        seed: of stochastic rounding, which 16-bit results then have; None: to nearest.
        allow_nonfinite: sum inf and NaN too.
    """

    def __init__(
        self,
        weights: Sequence[float],
        wide: torch.dtype,
        out: torch.dtype,
        *,
        seed: int | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        self._weights = list(weights)
        total = math.fsum(weights)
        self._total = 1.0 if abs(total - 1.0) < 1e-12 else total
        self._sum = torch.empty(TILE, dtype=wide)
        self._first = torch.empty(TILE, dtype=wide)
        self._next = torch.empty(TILE, dtype=wide)
        self._allow_nonfinite = allow_nonfinite
        self._is_narrower = out != wide
        self._rounding: Plan | None = None
        if seed is not None and out in HALVES:
            self._unrounded = torch.empty(TILE, dtype=torch.float32)
            self._rounded = torch.empty(TILE, dtype=out)
            self._rounding = Plan(
                [self._rounded], [self._unrounded], rounding="stochastic", seed=seed
            )

    def run(self, inputs: Sequence[Tensor], into: Tensor, number: int = 0) -> int | None:
        """Writes the sum of flat tensors into a flat one.

        Args:
            inputs: one per weight.
            into: of as many elements.
            number: of the first element, which random bits are counted by.

        Returns:
            The index of an element that is not finite, unless that is allowed; else None.
        """
        for start in range(0, into.numel(), TILE):
            stop = min(start + TILE, into.numel())
            tile = self._sum[: stop - start]
            parts = [one[start:stop] for one in inputs]
            self._by_differences(parts, tile)
            if not _is_finite(tile):
                # Differences overflow, or are NaN, where the sum itself need not be.
                self._one_by_one(parts, tile)
                if not self._allow_nonfinite and not _is_finite(tile):
                    return start + _first_not_finite(tile)
            self._round(tile, into[start:stop], number + start)
            if self._is_narrower and not self._allow_nonfinite:
                again = self._first[: stop - start].copy_(into[start:stop])
                if not _is_finite(again):
                    return start + _first_not_finite(again)
        return None

    def _by_differences(self, parts: Sequence[Tensor], total: Tensor) -> None:
        first = self._widened(parts[0], self._first)
        torch.mul(first, self._total, out=total)
        difference = self._next[: total.numel()]
        for part, weight in zip(parts[1:], self._weights[1:], strict=True):
            torch.sub(self._widened(part, self._next), first, out=difference)
            total.add_(difference, alpha=weight)

    def _one_by_one(self, parts: Sequence[Tensor], total: Tensor) -> None:
        total.zero_()
        for part, weight in zip(parts, self._weights, strict=True):
            total.add_(self._widened(part, self._next), alpha=weight)

    def _widened(self, part: Tensor, place: Tensor) -> Tensor:
        """The part in the dtype of the sum: itself, or a copy in ``place``."""
        return part if part.dtype == place.dtype else place[: part.numel()].copy_(part)

    def _round(self, tile: Tensor, into: Tensor, number: int) -> None:
        if self._rounding is None:
            into.copy_(tile)
            return
        # An average with weight 1 is its source, rounded. Through float32: from float64 that is a
        # rounding more, far below the one that is random.
        self._unrounded[: tile.numel()].copy_(tile)
        self._rounded.zero_()  # what it happens to hold may be NaN, which no weight makes up for
        self._rounding.lerp_(1.0, step=number)
        into.copy_(self._rounded[: tile.numel()])


def _is_finite(tile: Tensor) -> bool:
    total = tile.sum()
    # The sum of all is not finite where one is not; seldom, too, where all are.
    return bool(total.isfinite()) or bool(tile.isfinite().all())


def _first_not_finite(tile: Tensor) -> int:
    return int(tile.isfinite().logical_not_().nonzero()[0])
