"""Pairs whose source is on another device than the average (an average on the CPU, say)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from ema_fused.engine.memory import is_wrapper
from ema_fused.engine.pairs import label, overlap_error
from ema_fused.engine.parts import ListedPart, Part, Task, Update

# Sources are copied over in groups of about this size: large enough to use the link's bandwidth.
# The extra memory is that of one group, or of the largest tensor.
_GROUP_BYTES = 32 << 20


def _refuse_overlaps(tasks: Sequence[Task], names: Sequence[str] | None) -> None:
    """Raises ValueError where two averaged tensors share memory."""
    spans = []
    for task in tasks:
        tensor = task.averaged
        if is_wrapper(tensor):
            continue
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        spans.append((str(tensor.device), begin, begin + (last + 1) * tensor.itemsize, task.pair))
    spans.sort()
    for before, after in pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            raise overlap_error(
                label(before[3], names),
                label(after[3], names),
                "averaged tensors overlap in memory",
            )


class MovedPart(ListedPart):
    """Copies the sources to the averaged tensors' device, one group at a time, and updates there.

    Args:
        split: makes the parts that update pairs on one device.
    """

    backend = "moved"

    def __init__(
        self,
        tasks: Sequence[Task],
        arithmetic: str,
        split: Callable[[Sequence[Task]], Sequence[Part]],
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(tasks, arithmetic)
        self._split = split
        # Checked over all pairs before anything is written: a group's plan would find only the
        # overlaps within the group.
        _refuse_overlaps(self._distinct(), names)

    def _groups(self) -> Iterator[list[Task]]:
        group: list[Task] = []
        size = 0
        for task in self._distinct():
            group.append(task)
            size += task.source.nbytes
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    @torch.no_grad()
    def average(self, update: Update) -> bool:
        if not self.ready():
            return False
        for group in self._groups():
            here = [task._replace(source=task.source.to(task.averaged.device)) for task in group]
            for part in self._split(here):
                part.average(update)
        return True
