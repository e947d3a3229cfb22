"""The weight of an update: ``momentum_at`` of an averaged model, with its range checked."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class _HasMomentum(Protocol):
    def momentum_at(self, steps: Any) -> Any: ...


def checked_momentum(averaged: _HasMomentum, steps: int) -> float:
    """``averaged.momentum_at(steps)`` as a float.

    Raises:
        ValueError: it is outside [0, 1].
    """
    weight = float(averaged.momentum_at(steps))
    if not 0.0 <= weight <= 1.0:
        raise _out_of_range(averaged, weight, f"at step {steps}")
    return weight


def momentum_of_calls(averaged: _HasMomentum, steps: int, calls: int) -> float:
    """The combined momentum of the last ``calls`` calls: ``1 - (1 - m_1) * ... * (1 - m_n)``.

    Args:
        steps: the step of the last of them.

    Raises:
        ValueError: one of them is outside [0, 1].
    """
    kept = 1.0
    for earlier in range(steps - calls + 1, steps + 1):
        kept *= 1.0 - checked_momentum(averaged, earlier)
    return 1.0 - kept


def momentum_on_device(averaged: _HasMomentum, steps: Tensor) -> Any:
    """``averaged.momentum_at(steps)`` for a step on the device; a tensor's range isn't checked.

    Raises:
        ValueError: it is a number outside [0, 1].
    """
    weight = averaged.momentum_at(steps.double())
    if not isinstance(weight, Tensor) and not 0.0 <= weight <= 1.0:
        raise _out_of_range(averaged, weight, "now")
    return weight


def _out_of_range(averaged: object, weight: float, when: str) -> ValueError:
    """The error of a momentum outside [0, 1]."""
    return ValueError(
        f"{type(averaged).__name__} has momentum {weight!r} {when}; a number in [0, 1] is "
        f"expected: the weight of the model's values in the average"
    )
