"""The names that the hooks for mmcv 1.x import from it; an error if it isn't installed."""

from __future__ import annotations

from functools import partial
from typing import Any

from ema_fused.frameworks import missing
from ema_fused.hooks.run_log import notices_to

try:
    from mmcv.parallel import is_module_wrapper
    from mmcv.runner import HOOKS, Hook
except ImportError as error:
    raise missing("mmcv 1.x", "mmcv", error) from error


def _log(runner: Any, message: str) -> None:
    runner.logger.warning(message)


__all__ = ["HOOKS", "Hook", "in_the_log", "is_module_wrapper"]

in_the_log = notices_to(lambda runner: None if runner is None else partial(_log, runner))
"""A decorator of hooks, whose notices go to the runner's log then."""
