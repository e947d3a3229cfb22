"""A full disk is told as what it is, whatever has met it."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def full(error: BaseException) -> OSError | None:
    """The error that says that there is no more room for a file: this one, or what has led to it.

    ``torch.save`` to an opened file, and torch's distributed checkpoints, raise others after it.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, OSError) and one.errno in _FULL:
            return one
        seen.add(id(one))
        failures = getattr(one, "failures", {})  # of each rank, of a CheckpointException
        left += [one.__cause__, one.__context__, *(failure[0] for failure in failures.values())]
    return None


@contextmanager
def told_if_full(path: str | os.PathLike[str], size: int) -> Iterator[None]:
    """Raises OSError, with how much room is needed, if the block meets a full disk.

    Args:
        path: what is written, atomically.
        size: in bytes.
    """
    try:
        yield
    except BaseException as error:
        met = full(error)
        if met is None:
            raise
        raise OSError(
            met.errno,
            f"there is no room for {size:,} bytes, and nothing was written; make room, or write "
            f"elsewhere",
            os.fspath(path),
        ) from error


def size_of(content: Any) -> int:
    """The bytes of all tensors in it, and of texts; of sharded tensors those of the whole.

    Tied tensors are counted by each name.
    """
    if isinstance(content, Tensor):
        return math.prod(content.size()) * content.dtype.itemsize
    if isinstance(content, Mapping):
        return sum(map(size_of, content.values()))
    if isinstance(content, (list, tuple)):
        return sum(map(size_of, content))
    return len(content.encode()) if isinstance(content, str) else 0


def reserve(number: int, size: int) -> None:
    """Takes room on the disk for a whole file: if there is too little, nothing is read in vain.

    Args:
        number: of the open file.
        size: in bytes.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(number, 0, size)
        except OSError as error:
            if full(error):
                raise
            # A file system that can't do this; then writing fails when it is full.
    os.ftruncate(number, size)
