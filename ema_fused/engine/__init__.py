"""Updates lists of tensors in one launch per device; knows nothing of modules.

How a call becomes a launch: :mod:`.ops` (stateless; plans are cached in :mod:`.plan_cache`) or
:mod:`.plan` (prepared) -> :mod:`.pairs` (each averaged tensor and its source, checked) ->
:mod:`.planned_parts`, by :mod:`.routing` (which backend serves which pair) -> :mod:`.native`,
:mod:`.foreach`, :mod:`.across_devices` or :mod:`.sparse` (each updates one of the :mod:`.parts` of
a plan) -> the compiled core in ``csrc/``. A pair listed twice (tied tensors) is updated once:
``csrc/chunk_table.cpp`` drops repeated pairs, :mod:`.parts` those that torch updates.
:mod:`.reference` states what an update computes. May import torch and the compiled core; nothing
else of this package.
"""

from __future__ import annotations

from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.ops import copy_, lerp_, swap_
from ema_fused.engine.plan import Plan

__all__ = ["Plan", "SlowPathWarning", "copy_", "lerp_", "swap_"]
