"""Tensors in files: where their values are, and how to read a part of them."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

# Open at a time, of however many a checkpoint has.
_OPEN_FILES = 32


class OpenFiles:
    """Files that are open for reading, the latest used ones. Each thread has its own."""

    def __init__(self, most: int = _OPEN_FILES) -> None:
        self._most = most
        self._opened: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, into: memoryview) -> None:
        """Fills ``into`` with the bytes at ``offset``.

        Raises:
            ValueError: the file ends before.
        """
        number = self._number(path)
        done = 0
        while done < into.nbytes:
            count = os.preadv(number, [into[done:]], offset + done)
            if count == 0:
                raise ValueError(
                    f"{path} ends at byte {offset + done:,}, in the middle of a tensor: it is "
                    f"truncated, or is being written; copy or save it again"
                )
            done += count

    def _number(self, path: Path) -> int:
        number = self._opened.pop(path, None)
        if number is None:
            if len(self._opened) >= self._most:
                os.close(self._opened.popitem(last=False)[1])
            number = os.open(path, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                # A hint: some file systems don't take it.
                with suppress(OSError):
                    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._opened[path] = number
        return number

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in self._opened.values():
            os.close(number)
        self._opened.clear()


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor, and where it is in a file.

    Attributes:
        start: of its first element, in bytes from the beginning of the file.
        offsets: of its first element in the tensor.
        strides: between its elements in the file, in elements.
    """

    path: Path
    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        return all(
            size == 1 or stride == expected
            for size, stride, expected in zip(
                self.sizes, self.strides, row_major(self.sizes), strict=True
            )
        )


def row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(sizes[position + 1 :]) for position in range(len(sizes)))


def span(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie between the first and the last, with both of them."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one or several files; :meth:`read` reads a part of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def grain(self) -> int:
        """Parts begin and end at multiples of this: 1, the elements of a row, or of all."""
        if not self.count or self._is_flat:
            return 1
        for box in self.boxes:
            rows_apart = box.strides[0] >= span(box.sizes[1:], box.strides[1:])
            if box.sizes[0] > 1 and not rows_apart:
                return self.count
        return math.prod(self.shape[1:])

    @property
    def _is_flat(self) -> bool:
        return len(self.boxes) == 1 and self.boxes[0].is_contiguous

    def read(
        self, files: OpenFiles, start: int, stop: int, into: Tensor, memory: memoryview
    ) -> None:
        """Reads the elements [start, stop) in the order of rows.

        Args:
            files: of the calling thread.
            start: a multiple of :attr:`grain`, and so is ``stop``.
            stop: behind the last element.
            into: flat and contiguous, of this dtype, with ``stop - start`` elements.
            memory: the bytes of ``into``.
        """
        if stop == start:
            return
        if self._is_flat:
            box = self.boxes[0]
            files.read(box.path, box.start + start * self.dtype.itemsize, memory)
            return
        row = math.prod(self.shape[1:])
        first, last = start // row, stop // row
        rows = into.view(last - first, *self.shape[1:])
        for box in self.boxes:
            self._read_rows(files, box, first, last, rows)

    def _read_rows(self, files: OpenFiles, box: Box, first: int, last: int, into: Tensor) -> None:
        """Copies what rows [first, last) have of a box to its place in ``into``."""
        first_here = max(first, box.offsets[0])
        last_here = min(last, box.offsets[0] + box.sizes[0])
        if first_here >= last_here or 0 in box.sizes:
            return
        sizes = (last_here - first_here, *box.sizes[1:])
        values = bytearray(span(sizes, box.strides) * self.dtype.itemsize)
        skipped = (first_here - box.offsets[0]) * box.strides[0]
        files.read(box.path, box.start + skipped * self.dtype.itemsize, memoryview(values))
        part = torch.frombuffer(values, dtype=self.dtype).as_strided(sizes, box.strides)
        places = [slice(first_here - first, last_here - first)]
        for offset, size in zip(box.offsets[1:], box.sizes[1:], strict=True):
            places.append(slice(offset, offset + size))
        into[tuple(places)].copy_(part)

    def tensor(self) -> Tensor:
        """The whole tensor, in memory."""
        if not self.count:
            return torch.empty(self.shape, dtype=self.dtype)
        memory = bytearray(self.bytes)
        values = torch.frombuffer(memory, dtype=self.dtype)
        with OpenFiles() as files:
            self.read(files, 0, self.count, values, memoryview(memory))
        return values.view(self.shape)

    def pieces(self, most_bytes: int) -> Iterator[Tensor]:
        """The elements in the order of rows, flat, in pieces of ``most_bytes`` or the least."""
        with OpenFiles() as files:
            for start, stop in self.ranges(most_bytes // self.dtype.itemsize):
                memory = bytearray((stop - start) * self.dtype.itemsize)
                values = torch.frombuffer(memory, dtype=self.dtype)
                self.read(files, start, stop, values, memoryview(memory))
                yield values

    def ranges(self, most: int, grain: int = 1) -> Iterator[tuple[int, int]]:
        """Splits the elements into (start, stop) of at most ``most``, or of the least that is read.

        Args:
            most: elements.
            grain: parts begin and end at multiples of it too: the least of other tensors.
        """
        step = min(math.lcm(self.grain, grain), max(self.count, 1))
        step *= max(1, most // step)
        for start in range(0, self.count, step):
            yield start, min(start + step, self.count)


@dataclass(frozen=True)
class Unread:
    """In place of an object in a checkpoint that can't be read without running code.

    Attributes:
        problem: what it is, and what to do.
    """

    problem: str


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, without the values of its tensors.

    Attributes:
        path: the file or folder.
        format: ``safetensors``, ``torch`` (of ``torch.save``) or ``distributed`` (of
            ``torch.distributed.checkpoint``).
        tree: dictionaries in dictionaries; their leaves are :class:`StoredTensor`, or whatever else
            was saved; :class:`Unread` in place of what can't be read.
        files: those with the weights, in order.
        metadata: of safetensors files.
        tied: for each further name of a tied tensor, the name that it is saved under.
    """

    path: Path
    format: str
    tree: Mapping[Any, Any]
    files: tuple[Path, ...]
    metadata: Mapping[str, str]
    tied: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """The size of the files, in bytes."""
        return sum(file.stat().st_size for file in self.files)
