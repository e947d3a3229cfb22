"""Checks the arguments of an update (weights, overflow flag, step, tensor for the distance) and
converts them to what kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_fused.engine.checks import as_integer
from ema_fused.engine.pairs import label
from ema_fused.engine.parts import kind_of

_STEPS = 2**32  # the counter of the random bits has 32 bits for the step

Weight = float | Tensor


def as_weights(
    weight: Weight | Sequence[Weight],
    averages: int,
    pairs: int,
    labels: Sequence[str] | None,
) -> tuple[list[Weight], list[float]]:
    """(one weight per average, one number per pair); the second is empty unless given per pair.

    Args:
        averages: how many averages each source has.
        pairs: how many averaged tensors there are, over all averages.
        labels: names of the pairs, for messages.

    Raises:
        TypeError: a weight is no number.
        ValueError: the number of weights is wrong.
    """
    if isinstance(weight, Sequence) and not isinstance(weight, str):
        if averages > 1:
            if len(weight) != averages:
                raise ValueError(
                    f"{len(weight)} weights for {averages} averages; one each is expected"
                )
            return [_as_number(w, f" of average {k}") for k, w in enumerate(weight)], []
        if len(weight) != pairs:
            raise ValueError(f"{len(weight)} weights for {pairs} pairs; one a pair is expected")
        by_pair = [
            w if type(w) is float else float(_as_number(w, f" of {label(i, labels)}"))
            for i, w in enumerate(weight)
        ]
        return [0.0], by_pair
    return [_as_number(weight)] * averages, []


def _as_number(weight: object, of: str = "") -> Weight:
    """A weight as a float, or as the tensor on its CUDA device; ``of`` says whose, in messages."""
    if isinstance(weight, Tensor):
        if weight.dim() > 0:
            raise ValueError(
                f"the weight{of} is a tensor of shape {tuple(weight.shape)}; a number, a 0-dim "
                f"tensor or a list of numbers is expected"
            )
        if weight.is_complex():
            raise TypeError(f"the weight{of} is {weight.dtype}; a real number is expected")
        return weight if weight.is_cuda else float(weight)
    try:
        if isinstance(weight, str):
            raise TypeError
        return float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"the weight{of} is {weight!r}; a real number is expected") from None


def as_flag(found_inf: object) -> Tensor:
    """``found_inf`` as kernels read it: one float32 number, on its own device."""
    if not isinstance(found_inf, Tensor):
        raise TypeError(f"found_inf is {found_inf!r}; a tensor of one number is expected")
    if found_inf.numel() != 1:
        raise ValueError(
            f"found_inf has shape {tuple(found_inf.shape)}; a tensor of one number is expected"
        )
    if found_inf.dtype == torch.float32:
        return found_inf.detach()
    return (found_inf.detach() != 0).to(torch.float32)


def check_distance(squared_distance: object, averages: int) -> None:
    """Raises TypeError or ValueError unless it can hold one float64 number per average."""
    shape = () if averages == 1 else (averages,)
    expected = f"a float64 tensor of shape {shape} is expected"
    if not isinstance(squared_distance, Tensor):
        raise TypeError(f"squared_distance is {squared_distance!r}; {expected}")
    if squared_distance.dtype != torch.float64:
        raise TypeError(f"squared_distance is {kind_of(squared_distance)}; {expected}")
    if squared_distance.shape != shape:
        raise ValueError(f"squared_distance has shape {tuple(squared_distance.shape)}; {expected}")
    is_plain = squared_distance.layout == torch.strided and not squared_distance.is_meta
    if not is_plain or 0 in squared_distance.stride():
        raise ValueError(
            f"squared_distance has no memory of its own for each number (an expanded, sparse or "
            f"meta tensor); {expected}: torch.zeros({shape}, dtype=torch.float64)"
        )


def as_step(step: object) -> int | Tensor:
    """The counter of the random bits: an int modulo 2**32, or the tensor itself."""
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.dtype != torch.int64:
            raise ValueError(
                f"step is {kind_of(step)}; an integer or a 0-dim int64 tensor is expected"
            )
        return step
    return as_integer(step, "step") % _STEPS
