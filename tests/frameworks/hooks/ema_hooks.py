"""mmengine's ``EMAHook`` and ours: what they are called and told, and a run of each."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from mmengine.hooks import EMAHook

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.hooks import mmengine as ours
from tests.frameworks.hooks.mmengine_runs import Run, differences, side_by_side
from tests.frameworks.originals import original

THEIRS = "EMAHook"
OURS = "ema_fused.hooks.mmengine.EMAHook"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these releases import is deprecated by now
    EXP = original("mmdet==3.3.0", "mmdet.models.layers.ema").ExpMomentumEMA
    COSINE = original("mmpretrain==1.2.0", "mmpretrain.models.utils.ema").CosineEMA
    INVERTED = original("mmselfsup==1.0.0", "mmselfsup.models.utils.ema").CosineEMA
KINDS: dict[str, dict[str, Any]] = {
    "swa": {"ema_type": "StochasticWeightAverage"},
    "ema": {"ema_type": "ExponentialMovingAverage", "momentum": 0.07},
    "annealing": {"ema_type": "MomentumAnnealingEMA", "momentum": 0.05, "gamma": 9},
    "exp": {"ema_type": EXP, "momentum": 0.05, "gamma": 9},
    "cosine": {"ema_type": COSINE, "momentum": 0.3, "end_momentum": 0.01},
    "inverted-cosine": {"ema_type": INVERTED, "momentum": 0.9},
}
# Not about averages: how torch is told to load mmengine's files, and what is deprecated.
QUIET = pytest.mark.filterwarnings(
    "ignore:Environment variable TORCH_FORCE",
    "ignore:On January 1, 2023, MMCV",
    "ignore:.*deprecated",
)
LOOPS: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 4, "save_interval": 2},
    "iterations": {"iters": 20, "val_interval": 5, "save_interval": 10},
}


def trained_both(folder: Path, hook: dict[str, Any], **arguments: Any) -> tuple[Run, Run]:
    their_run, our_run = side_by_side(
        {"type": THEIRS, **hook}, {"type": OURS, **hook}, folder, **arguments
    )
    assert type(their_run.hook()) is EMAHook
    assert type(our_run.hook()) is ours.EMAHook
    assert isinstance(our_run.hook().ema_model, BaseAveragedModel)
    return their_run, our_run


def unequal(their_run: Run, our_run: Run) -> list[str]:
    found = our_run.everything()
    assert found["metrics"] and any(name.endswith(".pth") for name in found)
    return differences(their_run.everything(), found)


def without_integers(names: list[str]) -> list[str]:
    """Without integer buffers: mmengine doesn't update them with ``update_buffers``."""
    return [name for name in names if not name.endswith("num_batches_tracked")]
