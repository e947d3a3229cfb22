"""The schedules beside the functions that their originals compute them with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_swa_avg_fn

from ema_fused.averages import schedules

STEPS = [0, 1, 2, 3, 5, 10, 11, 50, 111, 999, 12_345, 10**6]


@pytest.mark.parametrize("after", [0, 10])
@pytest.mark.parametrize("least_decay", [0.0, 0.4])
@pytest.mark.parametrize(("gamma", "power"), [(1.0, 2 / 3), (7.0, 0.75)])
def test_diffusers_with_warm_up(gamma: float, power: float, least_decay: float, after: int) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    theirs = training_utils.EMAModel(
        nn.Linear(1, 1).parameters(),
        decay=0.999,
        min_decay=least_decay,
        update_after_step=after,
        use_ema_warmup=True,
        inv_gamma=gamma,
        power=power,
    )
    for step in STEPS:
        ours = schedules.warmup_power(
            step, momentum=0.001, largest=1 - least_decay, gamma=gamma, power=power, after=after
        )
        assert 1 - ours == pytest.approx(theirs.get_decay(step), abs=1e-15), step


@pytest.mark.parametrize("after", [0, 10])
@pytest.mark.parametrize("least_decay", [0.0, 0.4])
def test_diffusers_without_warm_up(least_decay: float, after: int) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    theirs = training_utils.EMAModel(
        nn.Linear(1, 1).parameters(), decay=0.999, min_decay=least_decay, update_after_step=after
    )
    for step in STEPS:
        ours = schedules.delayed_warmup_ratio(
            step, momentum=0.001, largest=1 - least_decay, after=after
        )
        assert 1 - ours == pytest.approx(theirs.get_decay(step), abs=1e-15), step


@pytest.mark.parametrize("after", [0, 100])
@pytest.mark.parametrize("least", [0.0, 0.4])
def test_ema_pytorch(least: float, after: int) -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    theirs = ema_pytorch.EMA(
        nn.Linear(1, 1), beta=0.999, update_after_step=after, inv_gamma=3.0, min_value=least
    )
    for step in STEPS:
        theirs.step.fill_(step)
        ours = schedules.warmup_power(
            step, momentum=0.001, largest=1 - least, gamma=3.0, after=after
        )
        # They compute in float32.
        assert 1 - ours == pytest.approx(theirs.get_current_decay(), abs=1e-7), step


def test_ema_pytorch_power_function() -> None:
    post_hoc = pytest.importorskip("ema_pytorch.post_hoc_ema")
    for sigma_rel in (0.03, 0.05, 0.1, 0.25):
        theirs = post_hoc.KarrasEMA(nn.Linear(1, 1), sigma_rel=sigma_rel)
        for step in STEPS:
            theirs.step.fill_(step)
            ours = schedules.power_function(step, sigma_rel=sigma_rel)
            assert 1 - ours == pytest.approx(theirs.beta, abs=1e-15, rel=1e-12), step


def test_torch_ema() -> None:
    torch_ema = pytest.importorskip("torch_ema")
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    theirs = torch_ema.ExponentialMovingAverage([weight], decay=0.9)
    expected = 0.0
    for step in range(1, 101):
        with torch.no_grad():
            weight.fill_(step**2)
        theirs.update()
        expected += schedules.warmup_ratio(step, momentum=0.1) * (step**2 - expected)
        assert theirs.shadow_params[0].item() == pytest.approx(expected, rel=1e-12)


def test_torch_swa() -> None:
    theirs = get_swa_avg_fn()
    average = torch.tensor(2.0, dtype=torch.float64)
    for step in range(20):
        value = torch.tensor(float(step**2), dtype=torch.float64)
        expected = average + schedules.mean(step) * (value - average)
        average = theirs(average, value, step)
        torch.testing.assert_close(average, expected)
