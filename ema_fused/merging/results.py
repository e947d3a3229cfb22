"""The merged tensors, as the writers of all formats take them: a layout, and values in parts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

RECORD = "ema_fused.merge"  # the key of the record in the metadata of files
RECORD_FILE = "merge.json"  # in folders

_AT_ONCE = 32 * 2**20  # bytes that are brought to the disk together


@dataclass(frozen=True)
class ResultTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Result:
    """Values of one tensor, flat, from element ``start`` on; ``memory`` has their bytes."""

    name: str
    start: int
    values: Tensor
    memory: memoryview


@dataclass(frozen=True)
class Merged:
    """What is written.

    Attributes:
        tensors: by name, in the order in which their values come.
        tied: for each further name of a tied tensor, its name in ``tensors``.
        values: of all tensors; those that are taken are overwritten when the next are.
        place: the names of the dictionaries, each in the one before, that the tensors are to be in.
        others: what stands beside them in their dictionary and is no tensor.
        versions: of the modules, as ``state_dict()._metadata``; or None.
        metadata: for the header of safetensors files.
        record: says how this was made, in JSON; as long before the values were taken as after.
    """

    tensors: Mapping[str, ResultTensor]
    tied: Mapping[str, str]
    values: Iterator[Result]
    place: tuple[str, ...]
    others: Mapping[str, Any]
    versions: Any
    metadata: Mapping[str, str]
    record: Callable[[], str]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    def take(self, names: Mapping[str, object]) -> Iterator[Result]:
        """All values of these tensors, which are the next ones."""
        left = sum(self.tensors[name].count for name in names)
        while left > 0:
            result = next(self.values)
            assert result.name in names
            left -= result.values.numel()
            yield result


class OutputFile:
    """An open file; a thread brings to the disk what was written, while more is read and summed.

    Else all of it would be written when the file is synchronised at the end, and nothing read.
    """

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None
        self._waiting = 0

    def write(self, data: memoryview, offset: int) -> None:
        """Writes all of ``data``."""
        done = 0
        while done < data.nbytes:
            done += os.pwrite(self.number, data[done:], offset + done)
        self._waiting += done
        if self._waiting >= _AT_ONCE and (self._running is None or self._running.done()):
            self._wait()
            self._running = self._thread.submit(os.fsync, self.number)
            self._waiting = 0

    def _wait(self) -> None:
        """Raises what the thread has raised."""
        if self._running is not None:
            self._running.result()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._thread.shutdown()
            if error is None:
                self._wait()
        finally:
            os.close(self.number)
