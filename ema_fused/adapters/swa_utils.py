"""``torch.optim.swa_utils`` with our update: ``AveragedModel`` and its averaging functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ema_fused.adapters.following import pairing_of
from ema_fused.checks import check_fraction
from ema_fused.known_integer import KnownInteger
from ema_fused.ops import update_
from ema_fused.pairs import can_average

__all__ = ["AveragedModel", "get_ema_multi_avg_fn", "get_swa_multi_avg_fn"]

MultiAverage = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAverage:
    """``averaged = decay * averaged + (1 - decay) * current`` for lists of tensors, in one launch.

    A drop-in for torch's function of this name, to the bit. Dtypes may differ within a pair, and
    integers follow by copy, where torch's averages them and cuts off what is behind the point.

    Args:
        decay: the weight of the average, in [0, 1].

    Raises:
        ValueError: ``decay`` is out of its range.
    """
    check_fraction("decay", decay)

    def ema_update(
        averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        _update(averaged, current, 1 - decay)

    return ema_update


def get_swa_multi_avg_fn() -> MultiAverage:
    """The mean of all values so far, for lists of tensors, in one launch.

    A drop-in for torch's function of this name. Where ``num_averaged`` is a tensor, as
    ``AveragedModel`` passes it, the weight is rounded to float32 as there; on a GPU it is read by
    the kernel. Integers follow by copy.
    """

    def swa_update(
        averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        _update(averaged, current, 1 / (num_averaged + 1))

    return swa_update


def _update(averaged: Sequence[Tensor], current: Sequence[Tensor], weight: Tensor | float) -> None:
    copied = [not can_average(a, c) for a, c in zip(averaged, current, strict=True)]
    update_(averaged, current, weight, only_copy=copied if any(copied) else None)


class AveragedModel(swa_utils.AveragedModel):
    """torch's ``AveragedModel``: the whole of ``update_parameters`` is one launch a device.

    No device is waited for: ``n_averaged`` is counted on the host and written into its buffer.
    Tensors are paired by name, wrappers seen through; dtypes and devices may differ. Integer
    buffers follow the model (torch's averages them and cuts off what is behind the point).

    The mean of all values (the default) and the exponential average of
    :func:`get_ema_multi_avg_fn`, ours or torch's, are planned. Of another ``avg_fn`` or
    ``multi_avg_fn`` nothing is known: it runs as in torch.

    Arguments, ``state_dict`` and attributes as torch's.

    Raises from ``update_parameters``:
        KeyError: names don't match.
        ValueError: shapes differ.
        TypeError: one side of a pair is floating-point and the other isn't.
        The averages are unchanged then.
    """

    def update_parameters(self, model: nn.Module) -> None:
        weight_at = _mean if self.multi_avg_fn is None else _weight_of(self.multi_avg_fn)
        if self.avg_fn is not None or weight_at is None:
            super().update_parameters(model)
            return
        pairing = pairing_of(
            self,
            self.module,
            model,
            update_buffers=self.use_buffers,
            caches_are_buffers=True,
        )
        count = self.__dict__.setdefault("_count", KnownInteger())
        n_averaged = count.read(self.n_averaged)
        if n_averaged == 0:
            pairing.copy_()
        else:
            pairing.average_(weight_at(n_averaged))
        count.write(self.n_averaged, n_averaged + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_count"}


def _mean(n_averaged: int) -> float:
    """The weight of the next value in the mean, in float32 as torch's, which comes of a tensor."""
    return torch.tensor(1 / (n_averaged + 1), dtype=torch.float32, device="cpu").item()


@functools.lru_cache(maxsize=16)
def _weight_of(function: Callable[..., None]) -> Callable[[int], float] | None:
    """The weight by ``n_averaged`` in a function that is made here or in torch; None: unknown."""
    inner = inspect.unwrap(function)
    if inner.__module__ not in (__name__, swa_utils.__name__):
        return None
    made_by = inner.__qualname__.partition(".")[0]
    if made_by == "get_swa_multi_avg_fn":
        return _mean
    if made_by == "get_ema_multi_avg_fn":
        weight = 1 - float(inspect.getclosurevars(inner).nonlocals["decay"])
        return lambda _: weight
    return None
