"""What the parts of a plan have in common: pairs that one backend serves, together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ema_fused.pairs import can_average


class Changed(NamedTuple):
    """A tensor that is no longer of the planned kind: its pair, its side, what was planned."""

    pair: int
    is_source: bool
    planned: str


def kind_of(tensor: Tensor) -> str:
    """How messages tell a tensor's kind."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


class Part(Protocol):
    """Pairs of a plan; all indices are places in the plan's lists."""

    backend: str
    indices: list[int]
    no_average: int | None  # the first pair that has no average and isn't only copied
    no_swap: int | None  # the first pair of two dtypes

    @property
    def elements(self) -> int: ...

    def changed(self) -> Changed | None:
        """The first tensor whose dtype or shape is no longer what was planned."""

    def ready(self) -> bool:
        """False where a tensor's dtype, shape, layout or device is no longer what was planned."""

    # Each returns False, with nothing done, where ready() would.
    def average(self, weight: float, weights: Sequence[float]) -> bool: ...

    def copy(self) -> bool: ...

    def swap(self) -> bool: ...


class ListedPart:
    """A part that keeps its tensors in lists and updates them by torch's functions.

    Swapping takes a temporary of one tensor.
    """

    def __init__(
        self,
        averaged: Sequence[Tensor],
        source: Sequence[Tensor],
        only_copy: Sequence[bool],
        arithmetic: str,
        indices: Sequence[int],
    ) -> None:
        self.indices = list(indices)
        self._averaged = list(averaged)
        self._source = list(source)
        self._only_copy = list(only_copy)
        self._arithmetic = arithmetic
        self._kinds = self._current_kinds()
        pairs = list(zip(indices, averaged, source, only_copy, strict=True))
        self.no_average = next(
            (i for i, a, s, copied in pairs if not copied and not can_average(a, s)), None
        )
        self.no_swap = next((i for i, a, s, _ in pairs if a.dtype != s.dtype), None)

    def _current_kinds(self) -> list[tuple[torch.device, str]]:
        return [(tensor.device, kind_of(tensor)) for tensor in (*self._averaged, *self._source)]

    def ready(self) -> bool:
        return self._current_kinds() == self._kinds

    def changed(self) -> Changed | None:
        kinds = zip(self._current_kinds(), self._kinds, strict=True)
        for k, ((_, now), (_, planned)) in enumerate(kinds):
            if now != planned:
                pair = self.indices[k % len(self.indices)]
                return Changed(pair, k >= len(self.indices), planned)
        return None

    def _distinct(self) -> list[int]:
        """Places of the pairs to update: tied ones once, those of one and the same memory never."""
        seen: set[tuple[object, ...]] = set()
        places = []
        for place, (a, s) in enumerate(zip(self._averaged, self._source, strict=True)):
            if a.numel() == 0:
                continue
            # The device is part of it: memory on two devices may have one address.
            sides = [(t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (a, s)]
            key = tuple(sides)
            if sides[0] == sides[1] or key in seen:
                continue
            seen.add(key)
            places.append(place)
        return places

    @property
    def elements(self) -> int:
        return sum(self._averaged[place].numel() for place in self._distinct())

    @torch.no_grad()
    def copy(self) -> bool:
        if not self.ready():
            return False
        for place in self._distinct():
            self._averaged[place].copy_(self._source[place])
        return True

    @torch.no_grad()
    def swap(self) -> bool:
        if not self.ready():
            return False
        for place in self._distinct():
            a, s = self._averaged[place], self._source[place]
            held = a.clone()
            a.copy_(s)
            s.copy_(held)
        return True
