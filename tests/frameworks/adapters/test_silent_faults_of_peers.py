"""Averages that stand still, in other packages; the rest of the page is tested beside plain loops.

See docs/silent_faults.md, and tests/averages/test_silent_faults.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import ExponentialMovingAverage
from tests.frameworks.adapters.adapter_cases import timm_originals
from tests.networks import Weight

DECAY = 0.999
Update = Callable[[], Tensor]  # returns the averaged weight


def timm_s(model: nn.Module) -> Update:
    ema = timm_originals().ModelEmaV2(model, decay=DECAY)

    def update() -> Tensor:
        ema.update(model)
        weight: Tensor = ema.module.weight
        return weight

    return update


def ema_pytorch_s(model: nn.Module) -> Update:
    package: Any = pytest.importorskip("ema_pytorch")
    ema = package.EMA(model, beta=DECAY, min_value=DECAY, update_every=1, update_after_step=0)

    def update() -> Tensor:
        ema.update()
        weight: Tensor = ema.ema_model.weight
        return weight

    return update


def torch_ema_s(model: nn.Module) -> Update:
    package: Any = pytest.importorskip("torch_ema")
    ema = package.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)

    def update() -> Tensor:
        ema.update()
        weight: Tensor = ema.shadow_params[0]
        return weight

    return update


@pytest.mark.parametrize("peer", [timm_s, ema_pytorch_s, torch_ema_s], ids=lambda p: p.__name__)
def test_sixteen_bits(peer: Callable[[nn.Module], Update]) -> None:
    model = Weight(1.0).bfloat16()
    update, ours = peer(model), ExponentialMovingAverage(model, 0.001, averaged_dtype=torch.float32)
    for _ in range(3):  # ema-pytorch's first ones copy
        update()
    ours.update_parameters(model)
    model.set_to(2.0)
    for _ in range(1000):
        theirs = update()
        ours.update_parameters(model)
    assert theirs.dtype == torch.bfloat16
    assert theirs == 1.0
    assert ours.module.weight.item() == pytest.approx(2.0 - 0.999**1000, rel=1e-4)
