"""Averages that count and take their momentum on the device, beside those that do it on the host.

That a CUDA graph can hold such an update is tested in test_gpu_beside.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import (
    AveragedWeights,
    BaseAveragedModel,
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
    attach,
)
from ema_fused.averages import schedules
from tests.networks import CPU_BACKENDS, conv_net, differences, generator, train

KINDS: dict[str, Any] = {
    "constant": partial(ExponentialMovingAverage, momentum=0.1),
    "schedule": partial(
        ExponentialMovingAverage, momentum=partial(schedules.warmup_power, momentum=0.01)
    ),
    "mean": StochasticWeightAverage,
    "mean_interval": partial(StochasticWeightAverage, interval=3),
    "annealing": partial(MomentumAnnealingEMA, gamma=5),
    "annealing_interval": partial(MomentumAnnealingEMA, gamma=5, interval=2),
    "exponential": partial(ExpMomentumEMA, gamma=5),
    "cosine": partial(CosineEMA, max_iters=8),
    "weights": partial(AveragedWeights, momentum=0.1, update_buffers=True),
    "waiting": partial(ExponentialMovingAverage, momentum=0.1, begin_step=4),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_it_averages_as_on_the_host(name: str, backend: str | None) -> None:
    model = conv_net(dtype=torch.float64)
    there, here = (KINDS[name](model, capturable=on, backend=backend) for on in (True, False))
    random = generator()
    for _ in range(12):
        train(model, random)
        there.update_parameters(model)
        here.update_parameters(model)
        found, expected = dict(there.state_dict()), dict(here.state_dict())
        assert torch.equal(found["steps"], expected["steps"])
        for key, tensor in expected.items():
            # Its exp() may differ in the last bit from that of the host.
            assert torch.allclose(found[key], tensor, rtol=1e-14, atol=1e-15), key


def test_stochastic_rounding_draws_the_same() -> None:
    model = conv_net(dtype=torch.bfloat16)
    there, here = (
        ExponentialMovingAverage(model, 0.1, rounding="stochastic", seed=5, capturable=on)
        for on in (True, False)
    )
    random = generator()
    for _ in range(6):
        train(model, random)
        there.update_parameters(model)
        here.update_parameters(model)
        assert differences(dict(there.state_dict()), dict(here.state_dict())) == []


def test_the_momentum_is_asked_for_with_the_count_as_a_tensor() -> None:
    asked: list[Any] = []

    def momentum(step: Tensor) -> Tensor:
        asked.append(step)
        return 1 / (step + 1)

    averaged = ExponentialMovingAverage(conv_net(), momentum, capturable=True)
    for _ in range(3):
        averaged.update_parameters(conv_net())
    assert [float(step) for step in asked] == [1.0, 2.0]
    assert all(step.dtype == torch.float64 and step.dim() == 0 for step in asked)


def test_a_resumed_run_goes_on() -> None:
    model = conv_net()
    averaged, other = (MomentumAnnealingEMA(model, gamma=5, capturable=True) for _ in range(2))
    random = generator()
    for _ in range(4):
        train(model, random)
        averaged.update_parameters(model)
    other.load_state_dict(averaged.state_dict())
    for _ in range(3):
        train(model, random)
        averaged.update_parameters(model)
        other.update_parameters(model)
    assert differences(dict(averaged.state_dict()), dict(other.state_dict())) == []
    assert averaged.steps == 7


@pytest.mark.parametrize("attached", [False, True])
def test_a_skipped_step_does_not_count(attached: bool) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, capturable=True)
    averaged.update_parameters(model)
    before = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    with torch.no_grad():
        model.head.weight.add_(1)
    for flag, counts in ((1.0, False), (0.0, True)):
        found_inf = torch.tensor(flag)
        if attached:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
            optimizer.found_inf = found_inf
            with attach(optimizer, model, averaged):
                optimizer.step()
        else:
            averaged.update_parameters(model, found_inf=found_inf)
        assert (averaged.steps == 2) == counts
        assert (differences(before, dict(averaged.state_dict())) == []) != counts


def test_a_momentum_out_of_range_is_refused() -> None:
    model = nn.Linear(2, 2)
    averaged: BaseAveragedModel = ExponentialMovingAverage(model, lambda step: 1.5, capturable=True)
    averaged.update_parameters(model)
    with pytest.raises(ValueError, match=r"momentum 1\.5 now"):
        averaged.update_parameters(model)
    assert averaged.steps == 1
