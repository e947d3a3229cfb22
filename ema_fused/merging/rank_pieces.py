"""Tensors that each rank has saved a part of, in files of its own.

Folders of ``torch.distributed.checkpoint`` tell the parts in their metadata. Its
``HuggingFaceStorageWriter`` writes safetensors files, and each file's header tells where the parts
in it begin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ema_fused.merging.stored_tensors import Box, StoredTensor

_FILE = re.compile(r"shard-(\d+)-.*\.safetensors")
_SHARDING = "DCP_SHARDING_INFO"
_OF_PARTS = (_SHARDING, "DCP_VERSION")
Offsets = Mapping[str, tuple[int, ...]]


def is_of_a_rank(file: Path) -> bool:
    """Whether it is called as the safetensors file of one of several ranks."""
    return _FILE.fullmatch(file.name) is not None


def refuse_gaps(path: Path, files: Sequence[Path]) -> None:
    """Raises ValueError if the file of a rank is missing, unless it is that of the last one.

    Args:
        path: what is read: a folder, or one file.
        files: all that are read.
    """
    numbers = {int(found[1]) for file in files if (found := _FILE.fullmatch(file.name))}
    if not numbers:
        return
    if path.is_file() and sum(map(is_of_a_rank, path.parent.iterdir())) > 1:
        raise ValueError(
            f"{path} has the parts of one rank, and those of others are beside it; pass the folder"
        )
    if numbers != set(range(1, len(numbers) + 1)):
        raise ValueError(
            f"{path} has the files of the ranks {', '.join(map(str, sorted(numbers)))}, and all "
            f"from 1 on are expected; copy the files of all ranks"
        )


def take_offsets(metadata: dict[str, str]) -> Offsets:
    """Where the parts in a safetensors file begin: taken out of its metadata, if it has any."""
    told = json.loads(metadata.get(_SHARDING, "{}"))
    for key in _OF_PARTS:
        metadata.pop(key, None)
    return {name: tuple(entry["saved_offsets"]) for name, entry in told.items()}


def shape_around(boxes: Sequence[Box]) -> tuple[int, ...]:
    """The shape of the tensor that these are all parts of."""
    ends = ([b + s for b, s in zip(box.offsets, box.sizes, strict=True)] for box in boxes)
    return tuple(max(each) for each in zip(*ends, strict=True))


def put_together(
    path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], boxes: Sequence[Box]
) -> StoredTensor:
    """The tensor that is made of all of these parts.

    Raises:
        ValueError: they aren't the whole tensor.
    """
    stored = StoredTensor(dtype, shape, tuple(boxes))
    if sum(StoredTensor(dtype, box.sizes, ()).count for box in boxes) != stored.count:
        raise ValueError(
            f"{name!r} in {path} is not whole: parts of it are missing, or there twice; copy the "
            f"files of all ranks"
        )
    return stored
