"""Plans whose averages lie in host memory and are updated by a thread beside the training.

:mod:`.offloaded_plan` has the methods of a :class:`~ema_fused.engine.Plan`; :mod:`.staging` brings
the sources over in pieces, :mod:`.background` is the thread. May import ``engine``.
"""

from __future__ import annotations

from ema_fused.offloading.offloaded_plan import OffloadedPlan

__all__ = ["OffloadedPlan"]
