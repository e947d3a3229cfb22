"""The part of a plan that carries sparse tensors along: a graph's adjacency, an averaging matrix.

They are copied, never averaged: a mean would have to unite the patterns of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ema_fused.engine.parts import ListedPart, Task, Update

_LAYOUTS = {
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
}


def is_carried(task: Task) -> bool:
    """Whether this is a pair of sparse tensors of one layout and shape that is only copied."""
    averaged, source = task.averaged, task.source
    return (
        task.only_copy
        and isinstance(averaged, Tensor)
        and isinstance(source, Tensor)
        and averaged.layout in _LAYOUTS
        and averaged.layout == source.layout
        and averaged.shape == source.shape
        and not (averaged.is_meta or source.is_meta)
    )


class SparsePart(ListedPart):
    """Pairs of sparse tensors, copied and swapped by torch on any devices."""

    backend = "sparse"

    def _distinct(self) -> list[Task]:
        pairs = {(id(task.averaged), id(task.source)): task for task in self._tasks}
        return [task for task in pairs.values() if task.averaged is not task.source]

    @torch.no_grad()
    def average(self, update: Update) -> bool:
        return update.is_skipped() or self.copy()

    @torch.no_grad()
    def copy(self) -> bool:
        if not self.ready():
            return False
        for task in self._distinct():
            _copy(task.averaged, task.source)
        return True

    @torch.no_grad()
    def swap(self) -> bool:
        if not self.ready():
            return False
        for task in self._distinct():
            held = task.averaged.clone()
            _copy(task.averaged, task.source)
            _copy(task.source, held)
        return True


def _copy(to: Tensor, source: Tensor) -> None:
    if source.layout != torch.sparse_coo and to._nnz() != source._nnz():
        to.resize_as_sparse_(source)  # only COO tensors take another pattern by copy_()
    to.copy_(source)
