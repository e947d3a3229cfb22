"""The layout of safetensors files, and of the folders that hold them in several shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ema_fused.merging.rank_pieces import (
    put_together,
    refuse_gaps,
    shape_around,
    take_offsets,
)
from ema_fused.merging.stored_tensors import Box, Contents, StoredTensor, row_major
from ema_fused.saving.safetensors_files import read_header, safetensors

# As they are called in the header, by the names of torch's dtypes: older torch lacks some.
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPES = {
    name: getattr(torch, torch_name)
    for name, torch_name in _NAMES.items()
    if hasattr(torch, torch_name)
}

_SNAPSHOT = "ema_fused power-function average 1"


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so is meant to be one."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40


def read_files(path: Path, files: Sequence[Path]) -> Contents:
    """The contents of one file, or of the shards of one model.

    Raises:
        ValueError: a file is damaged, or two hold the same name, or a rank's part is missing.
        ImportError: safetensors is not installed.
    """
    tree: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    parts: dict[str, list[Box]] = {}  # of tensors of which each rank has saved one
    dtypes: dict[str, torch.dtype] = {}
    refuse_gaps(path, files)
    for file in files:
        header = _checked_header(file)
        told = header.pop("__metadata__", {})
        offsets = take_offsets(told)
        metadata |= told
        start = 8 + int.from_bytes(_head(file), "little")
        for name, entry in header.items():
            tensor = _tensor(file, start, name, entry)
            if name in offsets:
                (box,) = tensor.boxes
                parts.setdefault(name, []).append(replace(box, offsets=offsets[name]))
                dtypes[name] = tensor.dtype
                continue
            if name in tree:
                raise ValueError(
                    f"{path} has {name!r} in two of its files, {file.name} and another"
                )
            tree[name] = tensor
    for name, boxes in parts.items():
        tree[name] = put_together(path, name, dtypes[name], shape_around(boxes), boxes)
    return Contents(path, "safetensors", tree, tuple(files), metadata, _ties(metadata, tree))


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(8)


def _checked_header(file: Path) -> dict[str, Any]:
    """The header, which safetensors itself has compared with the size of the file."""
    package = safetensors()
    try:
        with package.safe_open(file, "pt"):
            return read_header(file)
    except package.SafetensorError as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}); copy or save it again"
        ) from error


def _tensor(file: Path, start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{name!r} in {file} has the dtype {entry['dtype']}, which can't be read; known are "
            f"{', '.join(DTYPES)}"
        )
    shape = tuple(entry["shape"])
    begin = start + entry["data_offsets"][0]
    box = Box(file, begin, (0,) * len(shape), shape, row_major(shape))
    return StoredTensor(DTYPES[entry["dtype"]], shape, (box,))


def _ties(metadata: dict[str, str], tree: dict[str, StoredTensor]) -> dict[str, str]:
    """Further names, as ``safetensors.torch.save_model`` and our snapshots write them."""
    told = metadata
    if is_snapshot(metadata):
        told = json.loads(metadata["tied"])
    return {name: kept for name, kept in told.items() if name not in tree and kept in tree}


def is_snapshot(metadata: Mapping[str, str]) -> bool:
    """Whether ``PowerFunctionEMA.save_snapshot`` has written the file with this metadata."""
    return metadata.get("format") == _SNAPSHOT


def copied_names(metadata: dict[str, str]) -> frozenset[str]:
    """The tensors of a snapshot that its average only copies."""
    if not is_snapshot(metadata):
        return frozenset()
    return frozenset(json.loads(metadata["followers"]))
