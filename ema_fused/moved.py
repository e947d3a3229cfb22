"""Pairs whose source lives on another device than the average (an average kept on the CPU, say)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ema_fused.parts import ListedPart

# Sources are brought over in groups of about this size: enough to keep a link busy, and all the
# memory that this way ever takes beside the largest single tensor.
_GROUP_BYTES = 32 << 20


class MovedPart(ListedPart):
    """Brings the sources to the averaged tensors' device, a group at a time, and updates there."""

    backend = "moved"

    def __init__(
        self,
        averaged: Sequence[Tensor],
        source: Sequence[Tensor],
        only_copy: Sequence[bool],
        arithmetic: str,
        indices: Sequence[int],
        backend: str | None,
    ) -> None:
        super().__init__(averaged, source, only_copy, arithmetic, indices)
        self._backend = backend

    def _groups(self) -> Iterator[list[int]]:
        group: list[int] = []
        size = 0
        for place in self._distinct():
            group.append(place)
            size += self._source[place].nbytes
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    @torch.no_grad()
    def average(self, weight: float, weights: Sequence[float]) -> bool:
        if not self.ready():
            return False
        from ema_fused.plan import Plan  # a plan is made of parts: imported late

        for group in self._groups():
            averaged = [self._averaged[place] for place in group]
            here = [
                self._source[place].to(a.device) for place, a in zip(group, averaged, strict=True)
            ]
            plan = Plan(
                averaged,
                here,
                arithmetic=self._arithmetic,
                only_copy=[self._only_copy[place] for place in group],
                backend=self._backend,
            )
            plan.lerp_([weights[place] for place in group] if weights else weight)
        return True
