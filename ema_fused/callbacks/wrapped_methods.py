"""Lets a callback run code around methods of the trainer that it belongs to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def call_inside(
    trainer: Any, name: str, context: Callable[[dict[str, Any]], AbstractContextManager[Any]]
) -> None:
    """Replaces a method of ``trainer`` by one that calls it inside ``context(arguments)``.

    The context is entered only while the callback that ``context`` is a method of is one of the
    trainer's.
    """
    method = getattr(trainer, name)
    signature = inspect.signature(method)
    callback = context.__self__  # type: ignore[attr-defined]

    @functools.wraps(method)
    def inside(*positional: Any, **named: Any) -> Any:
        if callback not in trainer.callback_handler.callbacks:
            return method(*positional, **named)
        with context(signature.bind(*positional, **named).arguments):
            return method(*positional, **named)

    setattr(trainer, name, inside)
