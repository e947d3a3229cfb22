"""Checks of numbers from users; errors name the argument, its value and what is expected.

Each check gives the number back as a plain one of Python's, whatever it came as: a NumPy number or
a tensor of one element is a number too, and read once, here, never again in a step.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from ema_fused.engine.notices import warn


class WrongValueError(ValueError, AssertionError):
    """An argument out of its range.

    Also an AssertionError: OpenMMLab's classes, which ours replace, assert their arguments, and
    code around them expects that.
    """


class WrongTypeError(TypeError, AssertionError):
    """An argument of a wrong type; also an AssertionError, as :class:`WrongValueError` is."""


class WrongModelError(AttributeError, AssertionError):
    """A model without what a hook works on; also an AssertionError, as the originals raise."""


def plain(value: Any) -> Any:
    """``value`` as a float or an int if it is one number (a bool isn't one), else None."""
    if type(value) is float or type(value) is int:
        return value
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):
        try:
            value = value.item()  # of a tensor or an array
        except (RuntimeError, TypeError, ValueError):  # it has several elements, or none
            return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def as_integer(value: object, what: str) -> int:
    """``value`` as an int; raises TypeError unless it is a whole number (a bool isn't one)."""
    number = plain(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if not isinstance(number, int):
        raise WrongTypeError(f"{what} is {value!r}; an integer is expected")
    return number


def check_integer(name: str, value: object, *, least: int) -> int:
    """``value`` as an int.

    Raises TypeError unless it is a whole number, ValueError if it is below ``least``.
    """
    number = as_integer(value, name)
    if number < least:
        raise WrongValueError(f"{name} is {number}; at least {least} is expected")
    return number


def check_number(name: str, value: object, expected: str) -> float:
    """``value`` as a float or an int; raises TypeError unless it is a number."""
    number = plain(value)
    if number is None:
        raise WrongTypeError(f"{name} is {value!r}; {expected} is expected")
    return number  # type: ignore[no-any-return]


def check_fraction(name: str, value: object) -> float:
    """``value`` as a number; raises TypeError unless it is one, ValueError unless in [0, 1]."""
    number = check_number(name, value, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise WrongValueError(f"{name} is {number!r}; a number in [0, 1] is expected")
    return number


def check_positive(name: str, value: object) -> float:
    """``value`` as a number; raises TypeError unless it is one, ValueError unless in (0, inf)."""
    number = check_number(name, value, "a finite number above 0")
    if not 0.0 < number < math.inf:
        raise WrongValueError(f"{name} is {number!r}; a finite number above 0 is expected")
    return number


def check_not_negative(name: str, value: object) -> float:
    """``value`` as a number; raises TypeError unless it is one, ValueError unless in [0, inf)."""
    number = check_number(name, value, "a finite number, 0 or more,")
    if not 0.0 <= number < math.inf:
        raise WrongValueError(f"{name} is {number!r}; a finite number, 0 or more, is expected")
    return number


def check_momentum(momentum: object) -> float:
    """``momentum`` as a number; raises TypeError unless it is one, ValueError unless in (0, 1).

    Warns above 0.5: probably a decay was passed.
    """
    number = check_number("momentum", momentum, "a number in (0, 1)")
    if not 0.0 < number < 1.0:
        raise WrongValueError(
            f"momentum is {number}; a number in (0, 1) is expected: the weight of the model's "
            f"values, 1 - decay"
        )
    if number > 0.5:
        # The first sentence has mmengine's words, for whoever looks for them in a log.
        warn(
            f"The value of momentum in EMA is usually a small number, which is different from the "
            f"conventional notion of momentum, but got {number}: it is the weight of the model's "
            f"values, not of the average. A decay of {number} would be momentum={1 - number:.6g}"
        )
    return number
