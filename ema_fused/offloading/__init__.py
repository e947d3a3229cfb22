"""Plans whose averages are in host memory and updated by a thread while the model trains.

:mod:`.offloaded_plan` has the methods of a :class:`~ema_fused.engine.Plan`; :mod:`.staging` copies
the sources to the host in pieces, :mod:`.background` is the thread. May import ``engine``.
"""

from __future__ import annotations

from ema_fused.offloading.offloaded_plan import OffloadedPlan

__all__ = ["OffloadedPlan"]
