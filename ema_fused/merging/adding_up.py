"""Makes the merged values of each tensor: a sum, or the last input's if it has no average."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ema_fused.merging.recognising import Checkpoint
from ema_fused.merging.results import Result
from ema_fused.merging.stored_tensors import StoredTensor
from ema_fused.merging.streaming import LARGEST_PART, Memory, Part
from ema_fused.merging.summing import WeightedSum, wide_dtype

INTEGERS = ("counters", "last", "equal")


def is_averaged(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


class AddingUp:
    """Turns values of all inputs into those of the result.

    Args:
        checkpoints: the inputs.
        weights: one for each.
        dtypes: of the results, by name.
        seed: of stochastic rounding; None: to nearest.
        float64: sum everything in float64.
        allow_nonfinite: sum inf and NaN too.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        weights: Sequence[float],
        dtypes: Mapping[str, torch.dtype],
        *,
        seed: int | None,
        float64: bool,
        allow_nonfinite: bool,
    ) -> None:
        self._checkpoints = checkpoints
        self._weights = weights
        self._dtypes = dtypes
        self._seed = seed
        self._float64 = float64
        self._allow_nonfinite = allow_nonfinite
        # What snapshots only copied is no average in them.
        self._copied = frozenset.intersection(*(one.copied for one in checkpoints))
        self._sums: dict[tuple[torch.dtype, torch.dtype], WeightedSum] = {}
        self._memory = Memory(0)

    def results(self, read: Iterator[tuple[Part, list[Tensor]]]) -> Iterator[Result]:
        """The merged values of each part, which are overwritten by the next one's.

        Raises:
            ValueError: a value is not finite.
        """
        for part, inputs in read:
            dtype = self._dtypes[part.name]
            size = part.count * dtype.itemsize
            if size > self._memory.size:
                self._memory = Memory(size)
            into = self._memory.tensor(dtype, part.count)
            if is_averaged(dtype) and part.name not in self._copied:
                self._sum(part, inputs, into)
            else:
                into.copy_(inputs[-1])
            yield Result(part.name, part.start, into, self._memory.bytes(size))

    def _sum(self, part: Part, inputs: list[Tensor], into: Tensor) -> None:
        wide = wide_dtype(inputs[0].dtype, float64=self._float64)
        kind = (wide, into.dtype)
        if kind not in self._sums:
            self._sums[kind] = WeightedSum(
                self._weights,
                *kind,
                seed=self._seed,
                allow_nonfinite=self._allow_nonfinite,
            )
        number = zlib.crc32(part.name.encode()) + part.start
        bad = self._sums[kind].run(inputs, into, number)
        if bad is not None:
            raise ValueError(self._why_not_finite(part, inputs, bad, into.dtype))

    def _why_not_finite(
        self, part: Part, inputs: list[Tensor], bad: int, dtype: torch.dtype
    ) -> str:
        where = f"element {part.start + bad} of {part.name!r}"
        for checkpoint, values in zip(self._checkpoints, inputs, strict=True):
            value = values[bad].to(wide_dtype(values.dtype, float64=True))
            if not value.isfinite():
                return (
                    f"{where} is {value.item()} in {checkpoint.path}, and nothing was written; "
                    f"leave that checkpoint out, or pass allow_nonfinite (--allow-nonfinite)"
                )
        return (
            f"{where} is too large for {dtype} in the result, and nothing was written; choose "
            f"another dtype, or pass allow_nonfinite (--allow-nonfinite)"
        )


def refuse_differing_integers(
    checkpoints: Sequence[Checkpoint],
    tensors: Mapping[str, tuple[StoredTensor, ...]],
    integers: str,
) -> None:
    """Raises ValueError, naming them, if integers or bools differ that must be equal.

    Args:
        checkpoints: the inputs.
        tensors: of each input, by name.
        integers: as :func:`~ema_fused.merging.merge_files.merge` takes it.
    """
    if integers == "last":
        return
    differing = []
    for name, each in tensors.items():
        if is_averaged(each[0].dtype) or (integers == "counters" and each[0].count == 1):
            continue
        for checkpoint, other in zip(checkpoints[1:], each[1:], strict=True):
            if not _are_equal(each[0], other):
                differing.append(f"{name!r} ({each[0].dtype}) in {checkpoint.path}")
                break
    if differing:
        raise ValueError(
            f"integers have no average, and these differ from those in {checkpoints[0].path}; "
            f"nothing was written. integers='last' (--integers last) takes the last checkpoint's: "
            f"{', '.join(differing)}"
        )


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    pairs = zip(one.pieces(LARGEST_PART), other.pieces(LARGEST_PART), strict=False)
    if one.grain == other.grain:
        return all(torch.equal(a, b) for a, b in pairs)
    return torch.equal(one.tensor(), other.tensor())
