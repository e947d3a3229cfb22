"""The layout of folders of ``torch.distributed.checkpoint``, without a process group.

A tensor there is in as many parts as ranks have saved; each part is a ``torch.save`` inside a file.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from ema_fused.merging.rank_pieces import put_together
from ema_fused.merging.stored_tensors import Box, Contents, StoredTensor, Unread
from ema_fused.merging.torch_layout import NeedsCodeError, load_layout

METADATA = ".metadata"

# What the metadata is made of. It is a pickle: anything else in it could be code.
_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed._shard.sharded_tensor.metadata",
}
_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed._shard.metadata", "ShardMetadata"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." in name or not (is_dtype or module in _MODULES or (module, name) in _NAMES):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Part(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        self._file = file
        self._begin = begin
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        )
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")
        count = max(0, min(wanted.nbytes, self._length - self._at))
        self._file.seek(self._begin + self._at)
        read = self._file.read(count)
        wanted[: len(read)] = read
        self._at += len(read)
        return len(read)


def read_folder(path: Path) -> Contents:
    """The contents of a folder of ``torch.distributed.checkpoint.save``.

    Raises:
        ValueError: it is damaged, or its metadata holds something other than metadata.
    """
    metadata = _read_metadata(path / METADATA)
    try:
        return _contents(path, metadata)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise _not_whole(path / METADATA, error) from error


def _contents(path: Path, metadata: Metadata) -> Contents:
    parts = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): place
        for index, place in metadata.storage_data.items()
    }
    files = sorted({path / place.relative_path for place in parts.values()})
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(
            f"{path} lacks {', '.join(absent)}, which its metadata names; copy it whole"
        )
    planned = metadata.planner_data or {}
    entries = {
        tuple(planned.get(name, (name,))): (name, entry)
        for name, entry in metadata.state_dict_metadata.items()
    }

    def read(name: str, entry: Any) -> Any:
        if isinstance(entry, BytesStorageMetadata):
            return _object(path, parts.get((name, None)))
        return _tensor(path, name, entry, parts)

    return Contents(path, "distributed", _nested(entries, read), tuple(files), {}, {})


class _Later(Mapping[Any, Any]):
    """A dictionary that is read when something asks for what is in it."""

    def __init__(self, read: Callable[[], Mapping[Any, Any]]) -> None:
        self._read = read

    @functools.cached_property
    def _tree(self) -> Mapping[Any, Any]:
        return self._read()

    def __getitem__(self, key: Any) -> Any:
        return self._tree[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)


def _nested(entries: Mapping[tuple[Any, ...], Any], read: Callable[..., Any]) -> dict[Any, Any]:
    """Dictionaries in dictionaries, by the keys that lead to each entry.

    States of optimizers are most parts of a checkpoint, each takes most of a millisecond, and
    hardly anybody asks for them.
    """
    tree: dict[Any, Any] = {}
    later: dict[tuple[Any, ...], dict[tuple[Any, ...], Any]] = {}
    for keys, entry in entries.items():
        depth = next((at for at, key in enumerate(keys[:-1]) if "optim" in str(key).lower()), None)
        if depth is not None:
            later.setdefault(keys[: depth + 1], {})[keys[depth + 1 :]] = entry
        else:
            _put(tree, keys, read(*entry))
    for keys, inside in later.items():
        _put(tree, keys, _Later(functools.partial(_nested, inside, read)))
    return tree


def _put(tree: dict[Any, Any], keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def _not_whole(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} is no whole metadata of a checkpoint ({error!r}); copy or save it again"
    )


def _read_metadata(file: Path) -> Metadata:
    with file.open("rb") as opened:
        try:
            metadata = _Unpickler(opened).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file} holds more than the metadata of a checkpoint ({error}), which could be "
                f"code, and is refused"
            ) from error
        except OSError:
            raise
        except Exception as error:  # whatever damaged bytes happen to mean
            raise _not_whole(file, error) from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ValueError(f"{file} holds no metadata of torch.distributed.checkpoint")
    return metadata


def _loaded(path: Path, place: Any) -> Any:
    """What ``torch.load`` gives of one part, with stored tensors in place of tensors."""
    if getattr(place, "transform_descriptors", None):
        raise ValueError(
            f"{path} is compressed ({', '.join(place.transform_descriptors)}) and can't be read in "
            f"pieces; load it with torch.distributed.checkpoint and save it without extensions"
        )
    file = path / place.relative_path
    with file.open("rb") as opened:
        part: Any = io.BufferedReader(_Part(opened, place.offset, place.length))
        return load_layout(part, file, place.offset)


def _object(path: Path, place: Any) -> Any:
    if place is None:
        raise ValueError(f"{path} has no place for an object that its metadata names")
    try:
        return _loaded(path, place)
    except NeedsCodeError as error:
        # As states of random numbers are. It stands by itself, so what is beside it can be read.
        return Unread(str(error))


def _tensor(path: Path, name: str, entry: Any, parts: dict[Any, Any]) -> StoredTensor:
    boxes = []
    for chunk in entry.chunks:
        place = parts.get((name, tuple(chunk.offsets)))
        part = None if place is None else _loaded(path, place)
        if not isinstance(part, StoredTensor) or part.shape != tuple(chunk.sizes):
            raise ValueError(
                f"{name!r} in {path} isn't where the metadata says that it is; save it again"
            )
        box = part.boxes[0]
        boxes.append(Box(box.path, box.start, tuple(chunk.offsets), part.shape, box.strides))
    return put_together(path, name, entry.properties.dtype, tuple(entry.size), boxes)
