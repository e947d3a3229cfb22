"""Writes files of ``torch.save`` whose values come in parts.

``torch.save`` writes the file with holes in the places of the values (``skip_data``), and these are
filled. The archive's checksums of the values are left 0, as
``torch.serialization.set_crc32_options(False)`` leaves them: ``torch.load`` doesn't look at them.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ema_fused.merging.recognising import choose
from ema_fused.merging.results import RECORD, Merged, OutputFile
from ema_fused.merging.streaming import Memory
from ema_fused.merging.torch_layout import read_file
from ema_fused.saving.full_disk import reserve
from ema_fused.saving.whole_files import written_whole


def write_file(path: Path, merged: Merged) -> None:
    """Writes the file, atomically, with all values of ``merged``."""
    with written_whole(path) as beside:
        with beside.open("wb") as opened:
            _save_with_holes(opened, merged)
        stored = choose(read_file(beside), ".".join(merged.place)).tensors
        places = {name: tensor.boxes[0].start for name, tensor in stored.items() if tensor.boxes}
        with OutputFile(beside) as file:
            reserve(file.number, beside.stat().st_size)
            for result in merged.take(merged.tensors):
                start = places[result.name] + result.start * result.values.itemsize
                file.write(result.memory, start)
            ends = [places[name] + tensor.bytes for name, tensor in merged.tensors.items()]
            _write_around(file, beside, merged, min(places.values()), max(ends))


def _write_around(file: OutputFile, beside: Path, merged: Merged, first: int, end: int) -> None:
    """Writes what is before and after the values once more, with the hashes of what was read."""
    with tempfile.TemporaryFile(dir=beside.parent) as again:
        _save_with_holes(again, merged)
        again.seek(0)
        file.write(memoryview(again.read(first)), 0)
        again.seek(end)
        file.write(memoryview(again.read()), end)


def _save_with_holes(file: IO[bytes], merged: Merged) -> None:
    tensors: OrderedDict[str, Any] = OrderedDict(
        zip(merged.tensors, _placeholders(merged), strict=True)
    )
    tensors |= {name: tensors[kept] for name, kept in merged.tied.items()}
    tensors |= merged.others
    versions = OrderedDict(merged.versions or {})
    versions[RECORD] = {"json": merged.record()}  # load_state_dict looks up names of modules alone
    tensors._metadata = versions  # type: ignore[attr-defined]
    tree: Any = tensors
    for name in reversed(merged.place):
        tree = {name: tree}
    with torch.serialization.skip_data():
        torch.save(tree, file)  # an open one: a full disk is told then


def _placeholders(merged: Merged) -> Iterator[Tensor]:
    """Tensors to save without their values: all of a dtype in the same pages, never touched."""
    largest: dict[torch.dtype, int] = {}
    for tensor in merged.tensors.values():
        largest[tensor.dtype] = max(tensor.bytes, largest.get(tensor.dtype, 0))
    pages = {dtype: Memory(size) for dtype, size in largest.items()}
    for tensor in merged.tensors.values():
        if tensor.count:
            # Each is a storage of its own to torch, as it was made by itself.
            yield pages[tensor.dtype].tensor(tensor.dtype, tensor.count).view(tensor.shape)
        else:
            yield torch.empty(tensor.shape, dtype=tensor.dtype)
