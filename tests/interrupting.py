"""Sends a signal to this process at a chosen place of some code: at each, one after another.

A trace function, called before each bytecode, sends the signal before the chosen one. Python then
runs the handler where it would run it if the signal had come from outside: at the next bytecode
that looks (calls of C functions, the beginnings of functions, jumps backwards).
"""

from __future__ import annotations

import _thread
import signal
import sys
import time
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

_tracers: list[Any] = []


class Interruption:
    """Interrupts a function once, before the bytecode of number ``at`` in the given functions.

    Attributes:
        happened: whether the function has so many bytecodes.
        where: the interrupted function and line.
    """

    def __init__(self, at: int, functions: Collection[str], number: int = signal.SIGINT) -> None:
        self._left = at
        self._functions = functions
        self._number = number
        self.happened = False
        self.where = ""
        # The interpreter doesn't hold the trace function that it is calling: one object, kept.
        self._tracer: Any = self._trace
        _tracers.append(self._tracer)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_qualname not in self._functions:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.happened:
            self._left -= 1
            if self._left < 0:
                self.happened = True
                code = frame.f_code
                self.where = f"{code.co_qualname}, line {frame.f_lineno}, byte {frame.f_lasti}"
                sys.settrace(None)
                # In this function the handler would run as soon as a call returns; after a step of
                # an iterator nobody looks.
                for _ in map(_thread.interrupt_main, [self._number]):
                    return None
        return self._tracer

    def run(self, function: Callable[[], object]) -> BaseException | None:
        """What the function raises."""
        before = sys.gettrace()
        sys.settrace(self._tracer)
        try:
            function()
            time.sleep(0)  # looks for a signal that came at the very end
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)
        return None
