"""What the averaging functions of torch's ``AveragedModel`` do, where it is known."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import FunctionType

from torch.optim import swa_utils

__all__ = ["weight_and_arithmetic"]

_HOMES = ("ema_fused.adapters.swa_utils", swa_utils.__name__)


def _mean(n_averaged: int) -> float:
    """The weight of the next value in the mean of all values."""
    return 1 / (n_averaged + 1)


def _mean_in_float32(n_averaged: int) -> float:
    """The same, rounded as in torch's function for lists, which computes it from a tensor."""
    return ctypes.c_float(_mean(n_averaged)).value


def weight_and_arithmetic(
    function: Callable[..., object] | None,
) -> tuple[Callable[[int], float] | None, str]:
    """The weight as a function of ``n_averaged`` if ``function`` is ours or torch's, else None; and
    the arithmetic.

    Decided by the module of its code: ``functools.wraps`` can give another function our name.
    """
    if function is None:
        return _mean, "lerp"
    if _home(function) == "torch.utils._contextlib":  # torch.no_grad() around torch's own
        function = function.__wrapped__  # type: ignore[attr-defined]
    if not isinstance(function, FunctionType) or _home(function) not in _HOMES:
        return None, "lerp"
    made_by = function.__qualname__.partition(".")[0]
    if made_by == "get_swa_multi_avg_fn":
        return _mean_in_float32, "lerp"
    if made_by in ("get_ema_multi_avg_fn", "get_ema_avg_fn"):
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        weight = 1 - float(dict(cells)["decay"].cell_contents)
        return lambda _: weight, "products" if made_by == "get_ema_avg_fn" else "lerp"
    return None, "lerp"


def _home(function: object) -> object:
    return function.__globals__["__name__"] if isinstance(function, FunctionType) else None
