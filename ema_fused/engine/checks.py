"""Checks of numbers from users; errors name the argument, its value and what is expected."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from typing import Any, SupportsIndex


def as_integer(value: object, what: str) -> int:
    """``value`` as an int; raises TypeError unless it is an integer (a bool isn't one)."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{what} is {value!r}; an integer is expected")
    return operator.index(value)


def check_integer(name: str, value: object, *, least: int) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError if below ``least``."""
    if as_integer(value, name) < least:
        raise ValueError(f"{name} is {value}; at least {least} is expected")


def _check_number(name: str, value: object, expected: str) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; {expected} is expected")


def check_fraction(name: str, value: float) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless it lies in [0, 1]."""
    _check_number(name, value, "a number in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}; a number in [0, 1] is expected")


def check_positive(name: str, value: float) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless above 0 and finite."""
    _check_number(name, value, "a finite number above 0")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; a finite number above 0 is expected")


def check_momentum(momentum: Any) -> None:
    """Raises TypeError unless ``momentum`` is a number, ValueError unless it lies in (0, 1).

    Warns above 0.5: probably a decay was passed.
    """
    _check_number("momentum", momentum, "a number in (0, 1)")
    if not 0.0 < momentum < 1.0:
        raise ValueError(
            f"momentum is {momentum}; a number in (0, 1) is expected: the weight of the model's "
            f"values, 1 - decay"
        )
    if momentum > 0.5:
        warnings.warn(
            f"momentum is {momentum}. It is the weight of the model's values, not of the average, "
            f"and usually small: a decay of {momentum} would be momentum={1 - momentum:.6g}",
            stacklevel=4,
        )
