"""The layout of files of ``torch.save``: what they hold, and where the values of tensors are.

``torch.load`` reads the file with ``weights_only=True``, so that no code in it runs, and makes
tensors on the meta device, which know their place in the file instead of their values.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ema_fused.merging.stand_ins import OF_SHARDS, stand_ins
from ema_fused.merging.stored_tensors import Box, Contents, StoredTensor, span

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_FOUND = re.compile(r"\b((Unsupported|Trying|Can)\b.+?)\s*(by\Wdefault|\.?\s*$)", re.MULTILINE)


class NeedsCodeError(ValueError):
    """A pickle holds an object that only code in it could make."""


def is_torch_file(head: bytes) -> bool:
    """Whether a file that begins so is one of ``torch.save``, or a pickle."""
    return head.startswith((_ZIP, _PICKLE))


def read_file(path: Path) -> Contents:
    """The contents of a file of ``torch.save``.

    Raises:
        ValueError: it is damaged, needs code to be loaded, or is of a kind without a layout.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith(_ZIP):
            raise ValueError(
                f"{path} is a pickle, or in the format that torch.save had before torch 1.6, which "
                f"can't be read in pieces; if you trust it, load it once with torch.load(path, "
                f"weights_only=True) and save it again"
            )
    _refuse_big_endian(path)
    with path.open("rb") as file, stand_ins(path, for_all=False):
        tree = load_layout(file, path, 0)
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"{path} holds a {type(tree).__name__}; a dictionary of tensors is expected, as "
            f"torch.save(model.state_dict(), path) writes it"
        )
    return Contents(path, "torch", tree, (path,), {}, {})


def _refuse_big_endian(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
            order = archive.read(orders[0]) if orders else b"little"
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no whole file of torch.save ({error}); copy or save it again"
        ) from error
    if order != b"little":
        raise ValueError(
            f"{path} was written on a big-endian machine; load it with torch.load and save it again"
        )


def load_layout(source: IO[bytes], path: Path, begin: int) -> Any:
    """What ``torch.load`` gives of ``source``, with :class:`StoredTensor` in place of tensors.

    Args:
        source: the file, or a part of it. Open: by a path torch goes by the name.
        path: of the file.
        begin: of the part, in bytes from the beginning of the file.

    Raises:
        NeedsCodeError: it needs code to be loaded.
        ValueError: it is damaged, or holds a shard of a tensor.
    """
    try:
        loaded = torch.load(source, map_location="meta", weights_only=True)
        if not _knows_places(loaded):
            # Older torch tells them of fake tensors alone, which take seconds to import.
            from torch._subclasses.fake_tensor import FakeTensorMode

            source.seek(0)
            with FakeTensorMode():
                loaded = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        for module in OF_SHARDS:
            if module in str(error):
                raise _is_shard(path, module) from error
        raise NeedsCodeError(
            f"{path} can't be loaded without running code from it, and is refused "
            f"({_reason(error)}). Save "
            f"the state_dict alone; or, for classes that you trust, call merge() after "
            f"torch.serialization.add_safe_globals()"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a pickle that is damaged raises whatever its bytes happen to mean
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} is no whole file of torch.save ({reason}); copy or save it again"
        ) from error
    return _stored(loaded, path, begin)


def _reason(error: pickle.UnpicklingError) -> str:
    """What was found, without torch's advice, which is to run it."""
    found = _FOUND.search(str(error))
    return found[1] if found else str(error).partition("\n")[0]


def _knows_places(value: Any) -> bool:
    """Whether all tensors know their place in the file."""
    if isinstance(value, Tensor):
        place = None if _is_wrapper(value) else value.untyped_storage()
        return place is None or getattr(place, "_checkpoint_offset", None) is not None
    if isinstance(value, Mapping):
        return all(map(_knows_places, value.values()))
    return type(value) not in (list, tuple) or all(map(_knows_places, value))


def _stored(value: Any, path: Path, begin: int) -> Any:
    if isinstance(value, Tensor):
        return _stored_tensor(value, path, begin)
    if isinstance(value, Mapping):
        # A state_dict tells the versions of its modules in an attribute.
        told = getattr(value, "_metadata", None)
        inside = {key: _stored(one, path, begin) for key, one in value.items()}
        return StateDict(inside, told) if told is not None else inside
    if type(value) in (list, tuple):
        return type(value)(_stored(one, path, begin) for one in value)
    return value


class StateDict(dict[Any, Any]):
    """A dictionary from ``torch.save`` that tells the versions of modules (``_metadata``)."""

    def __init__(self, values: dict[Any, Any], versions: Any) -> None:
        super().__init__(values)
        self.versions = versions


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether its values are in other tensors: a DTensor's are in this rank's shard."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor)


def _is_shard(path: Path, kind: str) -> ValueError:
    return ValueError(
        f"{path} holds tensors of {kind}, of which a file of torch.save has one rank's shard "
        f"alone; save them by torch.distributed.checkpoint (ema_fused.checkpoints.save), or whole: "
        f"get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
    )


def _stored_tensor(tensor: Tensor, path: Path, begin: int) -> StoredTensor:
    if _is_wrapper(tensor):
        raise _is_shard(path, type(tensor).__module__)
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{path} holds a tensor of layout {tensor.layout}, or one that is conjugated or "
            f"negated when it is read; save dense tensors, as tensor.to_dense().resolve_conj()"
        )
    # The place of its storage (torch's notes on serialization have it).
    place: Any = tensor.untyped_storage()
    start = begin + place._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
    shape = tuple(tensor.shape)
    end = tensor.storage_offset() + span(shape, tuple(tensor.stride()))
    if end * tensor.dtype.itemsize > place.nbytes():
        raise ValueError(f"{path} holds a tensor that is larger than its storage: it is damaged")
    box = Box(path, start, (0,) * len(shape), shape, tuple(tensor.stride()))
    return StoredTensor(tensor.dtype, shape, (box,))
