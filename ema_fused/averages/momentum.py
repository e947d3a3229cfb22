"""The weight of an update: ``momentum_at`` of an averaged model, with its range checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from ema_fused.engine.notices import warn

# By then every warm-up falls.
_SETTLED = 10


def check_function(what: str, momentum: Callable[..., Any]) -> None:
    """Raises TypeError if ``momentum`` can't be called with a step and nothing else.

    Args:
        what: the argument it was given as, for messages.
    """
    try:
        inspect.signature(momentum).bind(0)
        return
    except TypeError as error:
        wrong: Exception = error
    except ValueError as error:
        # Some functions written in C have no signature, nor has a partial that doesn't fit.
        if not isinstance(momentum, functools.partial):
            return
        wrong = error
    raise TypeError(
        f"{what} is {momentum!r}, which can't be called with a step alone ({wrong}); a function of "
        f"the step is expected, with its other arguments bound by functools.partial"
    )


class _HasMomentum(Protocol):
    def momentum_at(self, steps: Any) -> Any: ...


def checked_momentum(averaged: _HasMomentum, steps: int) -> float:
    """``averaged.momentum_at(steps)`` as a float; warns once if it looks like a decay.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside [0, 1].
    """
    value = averaged.momentum_at(steps)
    if type(value) is float and 0.0 <= value <= 0.5:  # nearly always
        return value
    weight = checked_number(averaged, value, f"at step {steps}")
    if weight > 0.5 and steps >= _SETTLED:
        _question(averaged, weight, steps)
    return weight


def checked_number(averaged: object, value: Any, when: str) -> float:
    """``value`` as a float.

    Args:
        averaged: whose momentum it is, for messages.
        when: at which step, for messages.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside [0, 1].
    """
    error: type[Exception] = ValueError
    try:
        weight = float(value)
        if 0.0 <= weight <= 1.0:
            return weight
    except (TypeError, ValueError, RuntimeError):
        error = TypeError
    raise error(
        f"{type(averaged).__name__} has momentum {value!r} {when}; a number in [0, 1] is expected: "
        f"the weight of the model's values in the average"
    )


def combined(momenta: Iterable[float]) -> float:
    """The momentum of several averages in one: ``1 - (1 - m_1) * ... * (1 - m_n)``."""
    first, *others = momenta
    if not others:
        return first
    kept = 1.0 - first
    for momentum in others:
        kept *= 1.0 - momentum
    return 1.0 - kept


def momentum_of_calls(averaged: _HasMomentum, steps: int, calls: int) -> float:
    """The :func:`combined` momentum of the last ``calls`` calls.

    Args:
        steps: the step of the last of them.

    Raises:
        TypeError: one of them is no number.
        ValueError: one of them is outside [0, 1].
    """
    return combined(
        checked_momentum(averaged, earlier) for earlier in range(steps - calls + 1, steps + 1)
    )


def momentum_on_device(averaged: _HasMomentum, steps: Tensor) -> Any:
    """``averaged.momentum_at(steps)`` for a step on the device; a tensor's range isn't checked.

    Raises:
        TypeError: it is neither a number nor a tensor.
        ValueError: it is a number outside [0, 1].
    """
    weight = averaged.momentum_at(steps.double())
    return weight if isinstance(weight, Tensor) else checked_number(averaged, weight, "now")


def _question(averaged: Any, weight: float, steps: int) -> None:
    """Warns of a schedule that gives a large momentum and doesn't fall, as decays do."""
    if weight == 1.0 or getattr(averaged, "_is_questioned", False):
        return
    if float(averaged.momentum_at(steps - 1)) <= weight:
        warn(
            f"{type(averaged).__name__} has momentum {weight:.6g} at step {steps}, and it doesn't "
            f"fall: nearly all of the average is the model's present values. Momentum is their "
            f"weight; a schedule of the average's weight, a decay, is "
            f"momentum=lambda step: 1 - decay(step)",
        )
    averaged._is_questioned = True
