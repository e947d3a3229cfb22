"""Warnings, which a framework's run has in its log.

Outside of frameworks a notice is an ordinary warning. While a framework's hook is at work
(:func:`logged_by`) it goes to the log of the run instead, where its user looks and where it stays;
a warning would point into the framework. Python's filters decide in both cases whether it is seen.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

Log = Callable[[str], object]

_log: ContextVar[Log | None] = ContextVar("ema_fused.notices", default=None)
_also: list[Log] = []
_through = ["ema_fused"]


def warn(
    message: str, category: type[Warning] = UserWarning, stacklevel: int | None = None
) -> None:
    """Warns, or writes ``message`` into the log of the hook that is at work.

    Args:
        stacklevel: as in ``warnings.warn``; None is the first caller outside of this package, and
            of frameworks that call it.
    """
    level = _outside() if stacklevel is None else stacklevel + 1
    own = _log.get()
    logs = _also if own is None else [own]
    if logs:
        with warnings.catch_warnings(record=True) as seen:
            warnings.warn(message, category, stacklevel=level)
        for log in logs if seen else []:
            log(message)
    if own is None:
        warnings.warn(message, category, stacklevel=level)


@contextmanager
def logged_by(log: Log | None) -> Iterator[None]:
    """While it is open, notices of this thread go to ``log``; None makes them warnings."""
    token = _log.set(log)
    try:
        yield
    finally:
        _log.reset(token)


def tell_also(log: Log, framework: str) -> None:
    """Ordinary warnings go to ``log`` too, and are about lines outside of ``framework``."""
    _also.append(log)
    _through.append(framework)


def _outside() -> int:
    """The ``stacklevel``, seen from :func:`warn`, of the first caller outside."""
    frame = sys._getframe(2)
    level = 2
    while frame.f_back is not None and _package(frame) in _through:
        frame = frame.f_back
        level += 1
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
