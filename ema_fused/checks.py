"""Checks of numbers given by users: each names the argument, what was found, what is expected."""

from __future__ import annotations

import math


def check_integer(name: str, value: object, *, least: int) -> None:
    """Raises TypeError unless ``value`` is an int (no bool), ValueError if below ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; an int is expected")
    if value < least:
        raise ValueError(f"{name} is {value}; at least {least} is expected")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` lies in [0, 1] (NaN doesn't)."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}; a number in [0, 1] is expected")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is above 0 and finite."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; a finite number above 0 is expected")
