"""Tensors that a user names by patterns: regular expressions, searched for in plain names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from ema_fused.modules import naming
from ema_fused.modules.naming import without_wrappers

Pattern = str | re.Pattern[str]
# Which buffers are averaged: all, none, those whose names a pattern is found in, or for which a
# function of name and buffer is true.
Buffers = bool | Pattern | Sequence[Pattern] | Callable[[str, Tensor], bool]


def compiled(what: str, pattern: object) -> re.Pattern[str]:
    """``pattern`` as a regular expression.

    Args:
        what: the argument it was given as, for messages.

    Raises:
        TypeError: it is neither a string nor a compiled pattern of strings.
        ValueError: it is no regular expression.
    """
    try:
        found = re.compile(pattern) if isinstance(pattern, (str, re.Pattern)) else None
    except re.error as error:
        raise ValueError(
            f"{what}: {pattern!r} is no regular expression ({error}); a name to be found as it is "
            f"is re.escape(name)"
        ) from None
    if found is None or not isinstance(found.pattern, str):
        raise TypeError(f"{what}: {pattern!r} is no pattern; a regular expression is expected")
    return found


def is_chosen(choice: Buffers, name: str, buffer: Tensor) -> bool:
    """Whether ``choice`` names this buffer.

    Args:
        name: as the module has it; compared without the components that wrappers add.
    """
    if not choice or isinstance(choice, int):
        return bool(choice)
    plain = without_wrappers(name)
    if isinstance(choice, (str, re.Pattern)):
        return re.search(choice, plain) is not None
    if callable(choice):
        return bool(choice(plain, buffer))
    return any(re.search(pattern, plain) for pattern in choice)


def checked_buffers(choice: object, buffers: Callable[[], Sequence[str] | None]) -> Buffers:
    """``choice`` as :func:`is_chosen` takes it.

    Args:
        buffers: returns the plain names that can be chosen; None of a model without any tensors,
            such as stands for one that isn't there yet.

    Raises:
        TypeError: it is none of the kinds of ``Buffers``.
        ValueError: a pattern is no regular expression, or is found in none of the names.
    """
    if choice is None or isinstance(choice, int):
        return bool(choice)
    if callable(choice):
        return choice
    patterns = (choice,) if isinstance(choice, (str, re.Pattern)) else choice
    if not (isinstance(patterns, Sequence) and patterns):
        raise TypeError(
            f"update_buffers is {choice!r}; a bool, a regular expression, a list of them or a "
            f"function of name and buffer is expected"
        )
    names = buffers()
    for pattern in patterns:
        expression = compiled("update_buffers", pattern)
        if names is not None and not any(expression.search(name) for name in names):
            raise ValueError(
                f"update_buffers: {pattern!r} is found in the name of no buffer that can be "
                f"averaged (persistent, floating-point); there are: {naming._list(list(names))}"
            )
    return choice if isinstance(choice, (str, re.Pattern)) else tuple(patterns)
