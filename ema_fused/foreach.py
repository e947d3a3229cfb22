"""The fallback: the same updates by torch's own functions, on any device and without a build.

Also the readable statement of what the native kernels compute, which tests hold against them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_fused.pairs import can_average
from ema_fused.parts import ListedPart

_HALVES = (torch.float16, torch.bfloat16)


def compute_dtype(averaged: torch.dtype, source: torch.dtype) -> torch.dtype:
    """The dtype a mixed pair computes in: the wider of the two, at least float32."""
    wide = (torch.float64, torch.complex64, torch.complex128)
    if averaged == source and averaged in wide:
        return averaged
    return torch.float64 if torch.float64 in (averaged, source) else torch.float32


def _average_same(
    averaged: list[Tensor], source: list[Tensor], weights: list[float], arithmetic: str
) -> None:
    """Pairs of equal dtypes, as the original of each arithmetic writes it."""
    if arithmetic == "lerp":
        if all(weight == weights[0] for weight in weights):
            torch._foreach_lerp_(averaged, source, weights[0])
        else:
            for a, s, weight in zip(averaged, source, weights, strict=True):
                a.lerp_(s, weight)
        return
    for a, s, weight in zip(averaged, source, weights, strict=True):
        if arithmetic == "axpby":
            a.mul_(1 - weight).add_(s, alpha=weight)
        else:
            a.add_(s - a, alpha=weight)


def _average_mixed(averaged: Tensor, source: Tensor, weight: float, arithmetic: str) -> None:
    """A pair of two dtypes: computed in the wider one, rounded once into the averaged tensor."""
    dtype = compute_dtype(averaged.dtype, source.dtype)
    a = averaged.to(dtype)
    s = source.to(dtype)
    if arithmetic == "lerp":
        result = torch.lerp(a, s, weight)
    elif arithmetic == "axpby":
        kept = (a * (1 - weight)).to(averaged.dtype).to(dtype)
        result = kept.add_(s, alpha=weight)
    else:
        result = a.add(s - a, alpha=weight)
    averaged.copy_(result)


class ForeachPart(ListedPart):
    """Pairs served by torch where they are."""

    backend = "foreach"

    @torch.no_grad()
    def average(self, weight: float, weights: Sequence[float]) -> bool:
        """``weights``: one a pair of this part, or empty where ``weight`` serves all."""
        if not self.ready():
            return False
        same: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place in self._distinct():
            a, s = self._averaged[place], self._source[place]
            if self._only_copy[place] or not can_average(a, s):
                a.copy_(s)
            elif a.dtype == s.dtype and (a.dtype in _HALVES or a.dtype.itemsize > 2):
                same.setdefault((a.device, a.dtype), []).append(place)
            else:
                _average_mixed(a, s, weights[place] if weights else weight, self._arithmetic)
        for places in same.values():
            _average_same(
                [self._averaged[place] for place in places],
                [self._source[place] for place in places],
                [weights[place] if weights else weight for place in places],
                self._arithmetic,
            )
        return True
