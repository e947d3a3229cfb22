"""Writes safetensors files whose values come in parts: one file, or shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_fused.merging.results import RECORD, Merged, OutputFile, ResultTensor
from ema_fused.merging.safetensors_layout import DTYPES
from ema_fused.saving.full_disk import reserve
from ema_fused.saving.whole_files import written_whole

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = re.compile(r"-\d+-of-\d+$")
_ADAPTER = "adapter_model"  # PEFT reads it from one file
# Who reads such a folder looks for a file of this name; whatever else there is becomes "model".
KEPT = (_ADAPTER, "diffusion_pytorch_model")


def stem_of(file: str, *, is_safetensors: bool) -> str:
    """How the files of a folder are to be called, by the first file of the first input's."""
    stem = _SHARD.sub("", file.rpartition(".")[0])
    return stem if is_safetensors or stem in KEPT else "model"


def shards(
    tensors: Mapping[str, ResultTensor],
    files: Mapping[str, str],
    max_shard_bytes: int | None,
    stem: str,
) -> dict[str, list[str]]:
    """The names in each file, in the order in which they are written.

    Args:
        tensors: by name, in order.
        files: where each was in the first input; empty, if that had no files like these.
        max_shard_bytes: split anew, so that a file has at most these bytes (or one tensor); None:
            as ``files``.
        stem: of the names of files that were not in ``files``.

    Raises:
        ValueError: there would be several files of an adapter.
    """
    single = f"{stem}.safetensors"
    if max_shard_bytes is None:
        found: dict[str, list[str]] = {}
        for name in tensors:
            found.setdefault(files.get(name, single), []).append(name)
        return {file: in_order(names, tensors) for file, names in sorted(found.items())}
    split: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if split[-1] and filled + tensor.bytes > max_shard_bytes:
            split.append([])
            filled = 0
        split[-1].append(name)
        filled += tensor.bytes
    if len(split) == 1:
        return {single: in_order(split[0], tensors)}
    if stem == _ADAPTER:
        raise ValueError(
            f"an adapter of more than {max_shard_bytes:,} bytes can't be in several files, as PEFT "
            f"reads one; leave max_shard_bytes (--max-shard-size) out"
        )
    return {
        f"{stem}-{number:05d}-of-{len(split):05d}.safetensors": in_order(names, tensors)
        for number, names in enumerate(split, start=1)
    }


def in_order(names: list[str], tensors: Mapping[str, ResultTensor]) -> list[str]:
    """Large elements first, as safetensors has it: so each begins at a multiple of its size."""
    return sorted(names, key=lambda name: -tensors[name].dtype.itemsize)


def write_file(path: Path, merged: Merged, names: list[str]) -> None:
    """Writes one file, atomically, with the next values of ``merged``: those of ``names``.

    A file with all of them says how it was made. (When one of several is complete, the inputs have
    not all been read, and their hashes not found.)
    """
    layout: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = merged.tensors[name]
        layout[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    ties = {name: kept for name, kept in merged.tied.items() if kept in layout}
    header = _header(merged, ties, layout)  # of the right length
    with written_whole(path) as beside:
        beside.unlink(missing_ok=True)
        with OutputFile(beside) as file:
            reserve(file.number, len(header) + end)
            for result in merged.take(layout):
                start = len(header) + layout[result.name]["data_offsets"][0]
                file.write(result.memory, start + result.start * result.values.itemsize)
            # Now with the hashes of what was read.
            file.write(memoryview(_header(merged, ties, layout)), 0)


def _header(merged: Merged, ties: Mapping[str, str], layout: Mapping[str, Any]) -> bytes:
    metadata = {**merged.metadata, **ties, "format": "pt"}
    if len(layout) == len(merged.tensors):
        metadata[RECORD] = merged.record()
    header = json.dumps({"__metadata__": metadata, **layout}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def write_files(folder: Path, merged: Merged, files: Mapping[str, list[str]]) -> None:
    """Writes one file after the other into a folder, and the index if there are several."""
    for file, names in files.items():
        write_file(folder / file, merged, names)
    if len(files) > 1:
        stem = stem_of(next(iter(files)), is_safetensors=True)
        name, dot, variant = stem.partition(".")  # model.fp16-00001-of-00002.safetensors
        if name not in ("model", *KEPT):
            name, dot, variant = stem, "", ""
        index = {
            "metadata": {"total_size": merged.bytes},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        with written_whole(folder / f"{name}.safetensors.index{dot}{variant}.json") as beside:
            text = json.dumps(index, indent=2, sort_keys=True)
            beside.write_text(f"{text}\n", encoding="utf-8")
