"""A cache of plans, for callers that pass new lists of the same tensors at every call.

A plan is looked up by its tensors' addresses, dtypes, shapes, strides and devices. The cache
doesn't keep tensors alive. It never launches on a stale address either: a plan is used only if the
tensors of the call, which are alive, have exactly the planned addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ema_fused.engine.native import NativePart
from ema_fused.engine.parts import Part

_BOUND = 16  # entries, each of 48 bytes per chunk and some 200 per tensor


class Kind(NamedTuple):
    """The options of a plan: the part of its cache key that isn't about tensors."""

    pairs: int
    arithmetic: str
    only_copy: tuple[bool, ...] | None
    copy_others: bool
    backend: str | None


class _Entry(NamedTuple):
    kind: Kind
    parts: list[tuple[NativePart, list[int] | None]]  # with the indices of its pairs; None: all

    def matches(self, averaged: list[Tensor], source: list[Tensor]) -> bool:
        for part, places in self.parts:
            ours = averaged if places is None else [averaged[i] for i in places]
            theirs = source if places is None else [source[i] for i in places]
            if not part.matches(ours, theirs):
                return False
        return True


class PlanCache:
    """Keeps the parts of the most recently used plans, at most ``bound`` of them."""

    def __init__(self, bound: int = _BOUND) -> None:
        self._bound = bound
        self._entries: list[_Entry] = []  # most recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self, kind: Kind, averaged: list[Tensor], source: list[Tensor]
    ) -> list[NativePart] | None:
        """The parts of the plan for these tensors, to be run right away; None if not cached."""
        for entry in self._entries:
            if entry.kind == kind and entry.matches(averaged, source):
                if entry is not self._entries[0]:
                    rest = [other for other in self._entries if other is not entry]
                    self._entries = [entry, *rest]
                return [part for part, _ in entry.parts]
        return None

    def keep(self, kind: Kind, parts: Sequence[Part]) -> None:
        """Adds the parts of a plan; the plan must not be used afterwards.

        Plans with parts that have no native kernel aren't cached: for them planning is a small part
        of the time.
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
