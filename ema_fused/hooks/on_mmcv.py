"""The names that the hooks for mmcv 1.x import from it; an error if it isn't installed."""

from __future__ import annotations

from ema_fused.frameworks import missing

try:
    from mmcv.parallel import is_module_wrapper
    from mmcv.runner import HOOKS, Hook
except ImportError as error:
    raise missing("mmcv 1.x", "mmcv", error) from error

__all__ = ["HOOKS", "Hook", "is_module_wrapper"]
