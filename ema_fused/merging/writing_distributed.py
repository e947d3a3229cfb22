"""Writes folders of ``torch.distributed.checkpoint`` whose values come in parts."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from ema_fused.merging.results import Merged, Result, ResultTensor
from ema_fused.merging.streaming import Part


def grain_of(shape: tuple[int, ...]) -> int:
    """Parts of these many elements, or several times as many, are rectangular."""
    for dimension, size in enumerate(shape):
        if size > 1:
            return math.prod(shape[dimension + 1 :])
    return 1


def write_folder(folder: Path, merged: Merged, parts: Mapping[str, Sequence[Part]]) -> None:
    """Writes the folder with all values of ``merged``, each part as a chunk of its own.

    Args:
        folder: exists; it is not atomic in itself.
        parts: of each tensor, in the order in which the values come.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save(
                {},
                storage_writer=FileSystemWriter(folder, thread_count=1),
                planner=_Planner(merged, parts),
                no_dist=True,
            )
    except CheckpointException as error:
        # torch wraps all that is raised, an interruption too.
        raise next(iter(error.failures.values()))[0] from None


class _Planner(SavePlanner):
    """Gives torch the values when it writes them, not before."""

    def __init__(self, merged: Merged, parts: Mapping[str, Sequence[Part]]) -> None:
        self._merged = merged
        self._values: Iterator[Result] = merged.values
        self._parts = parts
        names = {kept: [kept] for kept in merged.tensors}
        for name, kept in merged.tied.items():
            names[kept].append(name)  # each of the names has the values: a folder has no ties
        self._names = names
        self._left: list[str] = []
        self._now: Tensor | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: Any = None,
        is_coordinator: bool = False,
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(MetadataIndex(self._path(name)), WriteItemType.BYTE_IO)
            for name in self._merged.others
        ]
        for kept, tensor in self._merged.tensors.items():
            for offsets, sizes in _boxes(tensor, self._parts[kept]):
                items += [self._item(name, tensor, offsets, sizes) for name in self._names[kept]]
        return SavePlan(items)

    def _path(self, name: str) -> str:
        return ".".join((*self._merged.place, name))

    def _item(
        self, name: str, tensor: ResultTensor, offsets: list[int], sizes: list[int]
    ) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        properties = TensorProperties(dtype=tensor.dtype)
        data = TensorWriteData(chunk, properties, torch.Size(tensor.shape))
        index = MetadataIndex(self._path(name), chunk.offsets)
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        own = [*self._merged.tensors, *self._merged.tied, *self._merged.others]
        metadata.planner_data = {self._path(name): (*self._merged.place, name) for name in own}
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            for name, value in self._merged.others.items():
                if self._path(name) == write_item.index.fqn:
                    saved = io.BytesIO()
                    torch.save(value, saved)
                    return saved
        assert write_item.tensor_data is not None
        sizes = write_item.tensor_data.chunk.sizes
        if 0 in sizes:
            return torch.empty(sizes, dtype=write_item.tensor_data.properties.dtype)
        if not self._left:
            result = next(self._values)
            self._left = [self._path(name) for name in self._names[result.name]]
            self._now = result.values
        assert self._left.pop(0) == write_item.index.fqn
        assert self._now is not None
        return self._now.view(sizes)


def _boxes(tensor: ResultTensor, parts: Sequence[Part]) -> Iterator[tuple[list[int], list[int]]]:
    """Offsets and sizes of each part of a tensor."""
    shape = tensor.shape
    if not parts:
        yield [0] * len(shape), list(shape)
    for part in parts:
        offsets, sizes = [0] * len(shape), list(shape)
        for dimension, size in enumerate(shape):
            if size > 1:
                row = math.prod(shape[dimension + 1 :])
                offsets[dimension] = part.start // row
                sizes[dimension] = part.count // row
                break
        yield offsets, sizes
