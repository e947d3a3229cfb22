"""Runs what must not be left half done, while signals wait.

Python calls a signal's handler between two bytecodes of the main thread, and a handler may raise:
Ctrl-C as KeyboardInterrupt, a time limit, a data loader whose worker has died. To block signals
(``pthread_sigmask``) isn't enough: any other thread may receive them, and the handler runs in the
main thread nevertheless. So the handlers themselves are replaced for so long.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from itertools import compress
from types import FrameType
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# signal.signal() spends 10 microseconds on its enums; here are the functions that it calls.
_signal: Any = importlib.import_module("_signal")
_NUMBERS = range(1, 32)  # real-time signals have other uses, and asking for each takes time


class _Held:
    """A handler in the place of others, which notes the signals that arrive.

    From :meth:`end` on it makes way for the others by itself: one of them may raise while they are
    put back.
    """

    def __init__(self) -> None:
        self.holds = True
        self._former: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._arrived: dict[int, FrameType | None] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.holds:
            self._arrived[number] = frame
            return
        _signal.signal(number, self._former[number])
        self._former[number](number, frame)

    def begin(self) -> None:
        """Replaces all handlers that are written in Python, unless another one holds them."""
        is_python = map(callable, map(_signal.getsignal, _NUMBERS))
        for number in compress(_NUMBERS, is_python):
            handler = _signal.getsignal(number)
            if not (isinstance(handler, _Held) and handler.holds):
                self._former[number] = handler
                _signal.signal(number, self)

    def end(self) -> None:
        """Puts the handlers back, and calls those whose signals have arrived."""
        self.holds = False
        try:
            for number, handler in self._former.items():
                if _signal.getsignal(number) is self:
                    _signal.signal(number, handler)
        finally:
            self._deliver()

    def _deliver(self) -> None:
        try:
            if self._arrived:
                number, frame = self._arrived.popitem()
                self._former[number](number, frame)
        finally:
            if self._arrived:
                self._deliver()


def undisturbed(
    operation: Callable[[], _Result], undo: Callable[[], object] | None = None
) -> _Result:
    """``operation()``; the handlers of signals that arrive meanwhile are called when it is done.

    Args:
        undo: called if such a handler raises. So the operation is done if this function returns,
            and not done if it raises. Without ``undo`` it is done nevertheless.

    In other threads than the main one no handlers run, so there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        return operation()
    is_done = False
    held = _Held()
    try:
        try:
            held.begin()
            result = operation()
            is_done = True
        finally:
            held.end()
    except BaseException:
        if is_done and undo is not None:
            certainly(undo)
        raise
    return result


def certainly(operation: Callable[[], object]) -> None:
    """:func:`undisturbed`, of an operation that is done even if a signal arrives before it began.

    What the signal's handler raises is raised afterwards.
    """
    has_begun = False

    def begin() -> None:
        nonlocal has_begun
        has_begun = True
        operation()

    try:
        undisturbed(begin)
    finally:
        if not has_begun:
            undisturbed(begin)
