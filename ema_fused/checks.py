"""Checks of numbers given by users: each names the argument, what was found, what is expected."""

from __future__ import annotations

import math
import operator
import warnings
from typing import SupportsIndex


def as_integer(value: object, what: str) -> int:
    """``value`` as an int (a bool is none); raises TypeError where it is no integer."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{what} is {value!r}; an integer is expected")
    return operator.index(value)


def check_integer(name: str, value: object, *, least: int) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError if below ``least``."""
    if as_integer(value, name) < least:
        raise ValueError(f"{name} is {value}; at least {least} is expected")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` lies in [0, 1] (NaN doesn't)."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}; a number in [0, 1] is expected")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is above 0 and finite."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; a finite number above 0 is expected")


def check_momentum(momentum: object) -> None:
    """Raises TypeError unless ``momentum`` is a number, ValueError unless it lies in (0, 1).

    Warns above 0.5: probably it was meant as a decay.
    """
    if not isinstance(momentum, (int, float)) or isinstance(momentum, bool):
        raise TypeError(f"momentum is {momentum!r}; a number in (0, 1) is expected")
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
