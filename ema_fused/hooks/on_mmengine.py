"""The names that the hooks for mmengine import from it, and its registries."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ema_fused.engine.notices import tell_also
from ema_fused.frameworks import missing
from ema_fused.hooks.registering import register_instead
from ema_fused.hooks.run_log import notices_to

try:
    from mmengine.hooks import EMAHook, Hook
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.model import is_model_wrapper
    from mmengine.registry import HOOKS, MODELS
    from mmengine.runner.checkpoint import load_state_dict
except ImportError as error:
    raise missing("mmengine", "mmengine", error) from error

__all__ = [
    "HOOKS",
    "MODELS",
    "EMAHook",
    "Hook",
    "MMLogger",
    "MessageHub",
    "in_the_log",
    "is_model_wrapper",
    "load_state_dict",
    "replace_hooks",
    "replace_models",
]


def _log(message: str) -> None:
    MMLogger.get_current_instance().warning(message)


in_the_log = notices_to(lambda runner: _log)
"""A decorator of hooks, whose notices go to mmengine's log then."""


def _log_of_the_run(message: str) -> None:
    """What isn't a hook's, say of an average that a model makes: to the log, if there is one."""
    if MMLogger._instance_dict:
        _log(message)


tell_also(_log_of_the_run, "mmengine")


def replace_hooks(scope: str, classes: Mapping[str, type]) -> None:
    """Registers hooks in the registry of ``scope``, replacing the originals."""
    register_instead(_registry("HOOKS", HOOKS, scope), classes)


def replace_models(scope: str, classes: Mapping[str, type]) -> None:
    """Registers averaged models in the registry of ``scope``, replacing the originals."""
    register_instead(_registry("MODELS", MODELS, scope), classes)


def _registry(name: str, root: Any, scope: str) -> Any:
    """The registry of the package ``scope``; mmengine's own if that isn't installed."""
    registry = root
    if scope != root.scope:
        try:
            registry = getattr(importlib.import_module(f"{scope}.registry"), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != scope:
                raise
    # Imports the originals, which then register themselves; ours must be registered later.
    registry.import_from_location()
    return registry
