"""The hash of a checkpoint's tensors, taken while they are read.

It is of names, dtypes, shapes and values, the values in the order of rows, and so the same whatever
the format and the files they are in. CRC-32 by default: it tells checkpoints apart and finds
damage, which is what it is for here, though anybody can forge it. SHA-256 was measured to take two
and a half times as long, more than reading and summing together.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from ema_fused.merging.stored_tensors import StoredTensor

HASHES = ("crc32", "sha256", "none")


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class _Nothing:
    def update(self, data: Any, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


_KINDS: dict[str, Callable[[], _Hash]] = {
    "crc32": _Crc32,
    "sha256": hashlib.sha256,
    "none": _Nothing,
}


def check_hash(kind: str) -> None:
    """Raises ValueError unless ``kind`` is in ``HASHES``."""
    if kind not in HASHES:
        raise ValueError(f"hash {kind!r} is none of {', '.join(HASHES)}")


class CheckpointHash:
    """The hash of one checkpoint; its tensors may come in any order, the parts of each in order."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._tensors: dict[str, _Hash] = {}
        self._lines: dict[str, str] = {}

    def update(self, name: str, tensor: StoredTensor, values: memoryview) -> None:
        """Adds the next values of a tensor."""
        if name not in self._tensors:
            self._tensors[name] = _KINDS[self._kind]()
            self._lines[name] = f"{name} {tensor.dtype} {list(tensor.shape)}"
        self._tensors[name].update(values)

    def hexdigest(self) -> str:
        """Of all tensors, in the order of their names."""
        whole = _KINDS[self._kind]()
        for name in sorted(self._tensors):
            whole.update(f"{self._lines[name]} {self._tensors[name].hexdigest()}\n".encode())
        return whole.hexdigest()
