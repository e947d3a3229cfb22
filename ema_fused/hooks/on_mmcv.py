"""What the modules on mmcv 1.x share: its names, or what to install for them."""

from __future__ import annotations

from ema_fused.frameworks import missing

try:
    from mmcv.parallel import is_module_wrapper
    from mmcv.runner import HOOKS, Hook
except ImportError as error:
    raise missing("mmcv 1.x", "mmcv", error) from error

__all__ = ["HOOKS", "Hook", "is_module_wrapper"]
