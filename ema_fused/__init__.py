"""Averaged copies of a model (EMA, SWA, mean teacher) at the speed of memory.

The folders are layers; each imports only those above it in this list:

* :mod:`ema_fused.engine`: updates of lists of tensors
* :mod:`ema_fused.offloading`: averages in host memory, updated in the background while the model
  trains
* :mod:`ema_fused.modules`: pairs a model with the module that holds its averages
* :mod:`ema_fused.saving`: files of averages
* :mod:`ema_fused.posthoc`: averages whose width is chosen after training
* :mod:`ema_fused.merging`: averages of checkpoints on disk
* :mod:`ema_fused.converting`: states of averages in the formats of other packages
* :mod:`ema_fused.averages`: the averaged models that users create, and momentum schedules
* :mod:`ema_fused.adapters`, :mod:`ema_fused.hooks`, :mod:`ema_fused.callbacks`: the same averages
  inside other packages' wrappers, frameworks and trainers
* :mod:`ema_fused.bench` and :mod:`ema_fused.cli`: the command line (``python -m ema_fused``)
"""

from __future__ import annotations

from ema_fused import public_modules
from ema_fused.averages import (
    Attachment,
    AveragedWeights,
    BaseAveragedModel,
    BiasCorrectedEMA,
    CosineEMA,
    EmaDecaySqrt,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    LatestWeightAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
    attach,
)
from ema_fused.averages import schedules as schedules
from ema_fused.engine import Plan, SlowPathWarning, copy_, lerp_, swap_
from ema_fused.posthoc import PowerFunctionEMA

public_modules.install()

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "AveragedWeights",
    "BaseAveragedModel",
    "BiasCorrectedEMA",
    "CosineEMA",
    "EmaDecaySqrt",
    "ExpMomentumEMA",
    "ExponentialMovingAverage",
    "LatestWeightAverage",
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
