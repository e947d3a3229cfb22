"""Plans for callers that come with fresh lists of the same tensors at every call.

A plan is found again by what the tensors are: their memory, dtypes, shapes, strides and devices,
asked of the tensors that are given. Nothing that is kept here keeps a tensor alive, and no address
can be stale: it is launched only where a living tensor has just told the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ema_fused.engine.native import NativePart
from ema_fused.engine.parts import Part

_BOUND = 16  # entries, each of 48 bytes a chunk and some 200 bytes a tensor


class Kind(NamedTuple):
    """What a plan is made for, beside its tensors."""

    pairs: int
    arithmetic: str
    only_copy: tuple[bool, ...] | None
    backend: str | None


class _Entry(NamedTuple):
    kind: Kind
    parts: list[tuple[NativePart, list[int] | None]]  # with the places of its pairs; None: all

    def matches(self, averaged: list[Tensor], source: list[Tensor]) -> bool:
        for part, places in self.parts:
            ours = averaged if places is None else [averaged[i] for i in places]
            theirs = source if places is None else [source[i] for i in places]
            if not part.matches(ours, theirs):
                return False
        return True


class PlanCache:
    """The parts of the plans that were used last, at most ``bound`` of them."""

    def __init__(self, bound: int = _BOUND) -> None:
        self._bound = bound
        self._entries: list[_Entry] = []  # the latest first

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self, kind: Kind, averaged: list[Tensor], source: list[Tensor]
    ) -> list[NativePart] | None:
        """The parts of the plan for these tensors, to be run at once; None: not known."""
        for entry in self._entries:
            if entry.kind == kind and entry.matches(averaged, source):
                if entry is not self._entries[0]:
                    rest = [other for other in self._entries if other is not entry]
                    self._entries = [entry, *rest]
                return [part for part, _ in entry.parts]
        return None

    def keep(self, kind: Kind, parts: Sequence[Part]) -> None:
        """Takes over the parts of a plan, which must not be used any more.

        Only of plans that native kernels serve: planning the others is a small part of their time.
        """
        native = [part for part in parts if isinstance(part, NativePart)]
        if len(native) < len(parts) or not native:
            return
        for part in native:
            part.release()
        whole = len(native) == 1
        placed = [(part, None if whole else part.places) for part in native]
        entry = _Entry(kind, placed)
        self._entries = [entry, *self._entries[: self._bound - 1]]

    def clear(self) -> None:
        self._entries = []
