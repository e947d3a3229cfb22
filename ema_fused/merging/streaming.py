"""Reads parts of many checkpoints ahead of their use, in memory of bounded size.

Each reading thread has some of the inputs and goes through the parts in order; a ring of slots
holds the values of all inputs for a few parts. Files are read, not mapped, into the same memory
again and again: so what is resident is what is counted.
"""

from __future__ import annotations

import math
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ema_fused.merging.stored_tensors import OpenFiles, StoredTensor

# Enough for a disk to be busy; more doesn't make it faster.
LARGEST_PART = 4 * 2**20
SMALLEST_PART = 64 * 2**10
_SLOTS = 3
_READERS = 4

# What is done with the values of an input after they were read: (input, part, values).
AfterReading = Callable[[int, "Part", memoryview], None]


@dataclass(frozen=True)
class Part:
    """The elements [start, stop) of one tensor, in the order of rows."""

    name: str
    tensors: tuple[StoredTensor, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def bytes(self) -> int:
        """Of one input."""
        return self.count * self.tensors[0].dtype.itemsize


class Memory:
    """Bytes that are used again and again, as tensors of any dtype."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Of the system, and not of the allocator: pages that are never written take no memory.
        self._pages = mmap.mmap(-1, max(size, mmap.PAGESIZE))

    def tensor(self, dtype: torch.dtype, count: int) -> Tensor:
        return torch.frombuffer(self._pages, dtype=dtype, count=count)

    def bytes(self, count: int) -> memoryview:
        return memoryview(self._pages)[:count]


class Stream:
    """The values of parts, in order; a context manager, which ends the threads.

    Args:
        parts: what to read, each of all inputs.
        inputs: how many there are.
        after_reading: called by the thread that has read.
        slots: how many parts are in memory at a time.
    """

    def __init__(
        self, parts: Sequence[Part], inputs: int, after_reading: AfterReading, slots: int
    ) -> None:
        self._parts = parts
        self._after_reading = after_reading
        largest = max((part.bytes for part in parts), default=0)
        self._slots = [[Memory(largest) for _ in range(inputs)] for _ in range(slots)]
        count = min(inputs, _READERS, os.cpu_count() or 1)
        self._stopped = False
        self._free = [threading.Semaphore(slots) for _ in range(count)]
        self._ready: list[queue.SimpleQueue[BaseException | None]] = [
            queue.SimpleQueue() for _ in range(count)
        ]
        self._threads = [
            threading.Thread(target=self._read, args=(number, range(number, inputs, count)))
            for number in range(count)
        ]

    @contextmanager
    def running(self) -> Iterator[Iterator[tuple[Part, list[Tensor]]]]:
        """Gives each part with its values, which are overwritten after the next one is taken."""
        try:
            for thread in self._threads:
                thread.start()
            yield self._take()
        finally:
            self._stopped = True
            for semaphore in self._free:
                semaphore.release()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()

    def _take(self) -> Iterator[tuple[Part, list[Tensor]]]:
        for number, part in enumerate(self._parts):
            for ready in self._ready:
                error = ready.get()
                if error is not None:
                    raise error
            slot = self._slots[number % len(self._slots)]
            dtype = part.tensors[0].dtype
            yield part, [memory.tensor(dtype, part.count) for memory in slot]
            for semaphore in self._free:
                semaphore.release()

    def _read(self, number: int, inputs: range) -> None:
        """What a thread does: reads its inputs' values of each part when there is a free slot."""
        try:
            with OpenFiles() as files:
                for index, part in enumerate(self._parts):
                    self._free[number].acquire()
                    if self._stopped:
                        return
                    slot = self._slots[index % len(self._slots)]
                    for which in inputs:
                        self._read_one(files, part, which, slot[which])
                    self._ready[number].put(None)
        except BaseException as error:
            self._ready[number].put(error)

    def _read_one(self, files: OpenFiles, part: Part, which: int, memory: Memory) -> None:
        values: Any = memory.bytes(part.bytes)
        stored = part.tensors[which]
        into = memory.tensor(stored.dtype, part.count)
        stored.read(files, part.start, part.stop, into, values)
        self._after_reading(which, part, values)


def part_bytes_in(memory: int, inputs: int) -> int:
    """The size of the parts of one input, for buffers of ``memory`` bytes.

    Raises:
        ValueError: it is too little for so many inputs.
    """
    for slots in (_SLOTS, 2, 1):
        size = memory // _buffers(slots, inputs)
        if size >= SMALLEST_PART:
            return min(size, LARGEST_PART)
    least = SMALLEST_PART * _buffers(1, inputs)
    raise ValueError(
        f"{inputs} checkpoints need buffers of at least {least:,} bytes, and beside what this "
        f"program has already {max(memory, 0):,} are left; raise memory (--memory)"
    )


def _buffers(slots: int, inputs: int) -> int:
    """How many parts are in memory: also the result, and what rows of one are gathered from."""
    return slots * inputs + 3


def slots_in(memory: int, parts: Sequence[Part], inputs: int) -> int:
    """How many parts can be read ahead.

    Raises:
        ValueError: a part is too large: its tensor can't be read in smaller ones.
    """
    largest = max(parts, key=lambda part: part.bytes, default=None)
    for slots in (_SLOTS, 2, 1):
        if largest is None or largest.bytes * _buffers(slots, inputs) <= memory:
            return slots
    assert largest is not None
    raise ValueError(
        f"{largest.name!r} is stored transposed or in columns: {largest.bytes:,} bytes of it have "
        f"to be in memory at a time, for each of {inputs} checkpoints; raise memory (--memory), or "
        f"save it contiguous"
    )


def parts_of(
    name: str, tensors: tuple[StoredTensor, ...], part_bytes: int, grain: int = 1
) -> list[Part]:
    """A tensor of all inputs in parts that all of them can be read in.

    Args:
        part_bytes: not more than this, if they can be so small.
        grain: parts begin and end at multiples of it too.
    """
    first = tensors[0]
    # All elements are a part that everybody can read.
    common = min(math.lcm(grain, *(tensor.grain for tensor in tensors)), max(first.count, 1))
    ranges = first.ranges(part_bytes // first.dtype.itemsize, common)
    return [Part(name, tensors, start, stop) for start, stop in ranges]
