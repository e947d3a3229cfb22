"""Notices of a hook go to the log of the run that it works for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from ema_fused.engine.notices import Log, logged_by

_Class = TypeVar("_Class", bound=type)


def notices_to(log_of: Callable[[Any], Log | None]) -> Callable[[_Class], _Class]:
    """A decorator of hooks: notices of their ``before_...`` and ``after_...`` methods go there.

    Args:
        log_of: the log of a runner; None leaves notices what they are elsewhere, warnings.
    """

    def decorate(cls: _Class) -> _Class:
        for name, method in list(vars(cls).items()):
            if name.startswith(("before_", "after_")):
                setattr(cls, name, _logging(method, log_of))
        return cls

    return decorate


def _logging(method: Callable[..., Any], log_of: Callable[[Any], Log | None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def logging(self: Any, runner: Any, *arguments: Any, **named: Any) -> Any:
        with logged_by(log_of(runner)):
            return method(self, runner, *arguments, **named)

    return logging
