"""Averages whose width is chosen after training (EDM2), reconstructed from snapshots.

:mod:`.power_function` averages while the model trains and writes :mod:`.snapshots`;
:mod:`.reconstruction` makes the average of any width from them, by the formulas of
:mod:`.power_profiles`. May import ``engine``, ``modules`` and ``saving``.
"""

from __future__ import annotations

from ema_fused.posthoc.power_function import PowerFunctionEMA
from ema_fused.posthoc.reconstruction import reconstruct

__all__ = ["PowerFunctionEMA", "reconstruct"]
