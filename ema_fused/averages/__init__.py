"""The averaged models that users create, their momentum schedules, and automatic updates.

:mod:`.updating` counts the updates and makes them; :mod:`.base` takes the options, saves and loads;
:mod:`.kinds` has the averages that keep a copy of the model, :mod:`.averaged_weights` the one
without, :mod:`.bias_corrected` one that is read out, :mod:`.latest_weights` the mean of a window of
checkpoints; :mod:`.schedules` gives the momentum as a function of the step; :mod:`.attaching`
updates an average after each step of an optimizer, and :mod:`.real_steps`
tells it of each. May import ``converting``, ``engine``, ``modules`` and ``posthoc``.
"""

from __future__ import annotations

from ema_fused.averages.attaching import Attachment, attach
from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.bias_corrected import BiasCorrectedEMA
from ema_fused.averages.kinds import (
    CosineEMA,
    EmaDecaySqrt,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.averages.latest_weights import LatestWeightAverage
from ema_fused.averages.telemetry import Distance

__all__ = [
    "Attachment",
    "AveragedWeights",
    "BaseAveragedModel",
    "BiasCorrectedEMA",
    "CosineEMA",
    "Distance",
    "EmaDecaySqrt",
    "ExpMomentumEMA",
    "ExponentialMovingAverage",
    "LatestWeightAverage",
    "MomentumAnnealingEMA",
    "StochasticWeightAverage",
    "attach",
]
