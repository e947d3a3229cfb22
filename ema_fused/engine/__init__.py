"""Lists of tensors, and nothing of modules: what is updated, by which backend, in one launch.

The way of an update: :mod:`.ops` (stateless, a plan found again by :mod:`.plan_cache`) or
:mod:`.plan` (prepared) -> :mod:`.pairs` (each averaged tensor and its source, checked) ->
:mod:`.routing` (which backend serves which pair) -> :mod:`.native`, :mod:`.foreach` or
:mod:`.across_devices` (the :mod:`.parts` of a plan) -> the compiled core in ``csrc/``. What an
update computes is written down in :mod:`.reference`. May import torch and the compiled core; of
this package nothing else.
"""

from __future__ import annotations

from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.ops import copy_, lerp_, swap_
from ema_fused.engine.plan import Plan

__all__ = ["Plan", "SlowPathWarning", "copy_", "lerp_", "swap_"]
