"""What is in the tensors of a checkpoint, and how far two of them are apart; piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ema_fused.converting.average_state import Tensors
from ema_fused.merging.stored_tensors import OpenFiles, StoredTensor

_PIECE = 2**21  # bytes of a tensor in memory at a time: they stay in the cache


@dataclass
class Looked:
    """What was seen of a tensor, or of two of one name.

    Attributes:
        squares: the sum of the squares of its finite elements.
        apart: the sum of the squares of the differences, where both are finite; None: of one.
        is_equal: the two are equal to the bit, of two dtypes in value; None: there is one.
    """

    name: str
    dtype: torch.dtype
    elements: int
    squares: float = 0.0
    apart: float | None = None
    nans: int = 0
    infinities: int = 0
    is_zero: bool = True
    is_equal: bool | None = None

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def distance(self) -> float | None:
        return None if self.apart is None else math.sqrt(self.apart)


def look(
    tensors: Tensors, others: Tensors | None, progress: Callable[[int], object] | None = None
) -> Iterator[Looked]:
    """Looks at each of ``tensors``, beside those of ``others`` of its name and shape.

    Args:
        tensors: in memory or in files.
        others: likewise; None: there are none.
        progress: called with the number of bytes that were read.
    """
    with OpenFiles() as files:
        for name, tensor in tensors.items():
            other = None if others is None else others.get(name)
            if other is not None and tuple(other.shape) != tuple(tensor.shape):
                other = None
            yield _look(name, tensor, other, files, progress)


def _look(
    name: str,
    tensor: Any,
    other: Any,
    files: OpenFiles,
    progress: Callable[[int], object] | None,
) -> Looked:
    seen = Looked(name, tensor.dtype, math.prod(tensor.shape))
    if other is not None:
        seen.apart, seen.is_equal = 0.0, True
    for piece, beside in _pieces(tensor, other, files):
        _add(seen, piece, beside)
        if progress is not None:
            progress(piece.nbytes + (0 if beside is None else beside.nbytes))
    return seen


def _pieces(tensor: Any, other: Any, files: OpenFiles) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Both, flat and in equal pieces."""
    given = [one for one in (tensor, other) if one is not None]
    grain = math.lcm(*(one.grain for one in given if isinstance(one, StoredTensor)))
    grain = min(grain, max(1, math.prod(tensor.shape)))
    most = max(1, _PIECE // tensor.dtype.itemsize // grain) * grain
    memory = [bytearray() for _ in given]
    count = math.prod(tensor.shape)
    for start in range(0, count, most):
        stop = min(start + most, count)
        parts = []
        for number, one in enumerate(given):
            if isinstance(one, Tensor):
                parts.append(one.detach().reshape(-1)[start:stop].cpu())
                continue
            size = (stop - start) * one.dtype.itemsize
            if len(memory[number]) != size:
                memory[number] = bytearray(size)
            part = torch.frombuffer(memory[number], dtype=one.dtype)
            one.read(files, start, stop, part, memoryview(memory[number]))
            parts.append(part)
        yield parts[0], parts[1] if other is not None else None


def _add(seen: Looked, piece: Tensor, beside: Tensor | None) -> None:
    if beside is not None and seen.is_equal:
        seen.is_equal = _same_bits(piece, beside)
    if not (piece.dtype.is_floating_point or piece.dtype.is_complex):
        seen.is_zero = seen.is_zero and not bool(piece.any())
        if beside is not None and seen.apart is not None:
            seen.apart += _squares(piece.double() - beside.double())
        return
    values = _real(piece)
    squares = _squares(values)
    if not math.isfinite(squares):
        seen.nans += int(values.isnan().sum())
        seen.infinities += int(values.isinf().sum())
        squares = _squares(_finite(values.double()))
    seen.squares += squares
    # A sum of squares that is 0 may be one of very small numbers.
    seen.is_zero = seen.is_zero and squares == 0 and not bool((values != 0).any())
    if beside is not None and seen.apart is not None:
        other = _real(beside)
        difference = other - values
        apart = _squares(difference)
        if not math.isfinite(apart):
            apart = _squares(_finite(other.double() - values.double()))
        seen.apart += apart


def _real(piece: Tensor) -> Tensor:
    """As real numbers of 32 bits or more."""
    if piece.dtype.is_complex:
        piece = torch.view_as_real(piece).reshape(-1)
    return piece if piece.dtype in (torch.float32, torch.float64) else piece.float()


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0)


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype:  # a float32 average of bfloat16 weights, say
        wide = torch.promote_types(first.dtype, second.dtype)
        return torch.equal(first.to(wide), second.to(wide))
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
