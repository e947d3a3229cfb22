"""Writes what a format has built: whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_fused.converting.average_state import Built, Format
from ema_fused.merging.safetensors_layout import DTYPES
from ema_fused.saving import whole_files
from ema_fused.saving.full_disk import size_of, told_if_full

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_SAFETENSORS = ".safetensors"
_PIECE = 2**24  # bytes


def check_output(path: Path, format: Format) -> None:
    """Refuses an output that the format can't have, or that holds something else.

    Raises:
        ValueError: a file is named where the format is a folder, or the other way.
        FileExistsError: the folder isn't empty.
    """
    is_folder = path.suffix not in (*_FILES, _SAFETENSORS)
    if format.output == "folder" and not is_folder:
        raise ValueError(f"{path} is named as a file, and --to {format.name} writes a folder")
    if format.output == "file" and is_folder:
        raise ValueError(
            f"{path} is no name of a file of torch.save, which --to {format.name} writes; end it "
            f"with .pt, .pth or .ckpt"
        )
    if format.output == "file" and path.suffix == _SAFETENSORS:
        raise ValueError(
            f"{path} would be a safetensors file, and --to {format.name} is one of torch.save; end "
            f"it with .pt, .pth or .ckpt"
        )
    if path.is_dir() and (not is_folder or any(path.iterdir())):
        raise FileExistsError(f"{path} is a folder with files in it; name one that isn't there")


def write(path: Path, built: Built) -> None:
    """Writes to ``path``, by its ending: safetensors, ``torch.save``, or a folder.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    content = built.tree if built.folder is None else built.folder
    with told_if_full(path, size_of(content)), whole_files.nothing_left(path):
        if built.folder is not None:
            _write_folder(path, built.folder)
        elif path.suffix == _SAFETENSORS:
            with whole_files.written_whole(path) as beside:
                write_safetensors(beside, built.tree)
        elif path.suffix in _FILES:
            # Opened here: what torch opens itself doesn't tell why it can't be written.
            with whole_files.written_whole(path) as beside, beside.open("wb") as file:
                torch.save(_plain(built.tree), file)
        else:
            from ema_fused.saving import checkpoints  # takes most of a second to import

            checkpoints.save(dict(built.tree), path)


def _plain(tree: Any) -> Any:
    """Plain dictionaries, but for those that tell something of themselves, as a state_dict."""
    if not isinstance(tree, Mapping) or hasattr(tree, "_metadata"):
        return tree
    return {key: _plain(one) for key, one in tree.items()}


def _write_folder(path: Path, files: Mapping[str, Any]) -> None:
    whole_files.begin_beside(path)
    beside = whole_files.beside(path)
    for name, content in files.items():
        if isinstance(content, str):
            (beside / name).write_text(content, encoding="utf-8")
        else:
            write_safetensors(beside / name, content)
        with (beside / name).open("rb+") as file:
            os.fsync(file.fileno())
    if path.is_dir():
        path.rmdir()  # it is empty
    whole_files.put_in_place(path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written piece by piece; tied tensors once for each name.

    Raises:
        ValueError: a dtype has no name in these files.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in _in_order(tensors):
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name!r} has the dtype {tensor.dtype}, which safetensors has not")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _in_order(tensors):
            for piece in _bytes_of(tensor):
                file.write(piece)


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Large elements first, so that each begins at a multiple of its size."""
    return sorted(tensors.items(), key=lambda one: (-one[1].dtype.itemsize, one[0]))


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), _PIECE):
        yield memoryview(flat[begin : begin + _PIECE].numpy().data)
