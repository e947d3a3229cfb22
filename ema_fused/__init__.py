"""Averaged copies of a model (EMA, SWA, mean teacher) at the speed of memory."""

from __future__ import annotations

from ema_fused.attaching import Attachment, attach
from ema_fused.averaged_model import BaseAveragedModel
from ema_fused.averaged_weights import AveragedWeights
from ema_fused.averages import (
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.backends import SlowPathWarning
from ema_fused.ops import copy_, lerp_, swap_
from ema_fused.plan import Plan
from ema_fused.power_function import PowerFunctionEMA

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "AveragedWeights",
    "BaseAveragedModel",
    "CosineEMA",
    "ExpMomentumEMA",
    "ExponentialMovingAverage",
    "MomentumAnnealingEMA",
    "Plan",
    "PowerFunctionEMA",
    "SlowPathWarning",
    "StochasticWeightAverage",
    "attach",
    "copy_",
    "lerp_",
    "swap_",
]
