"""The distance between a model and its average, as averaged models sample it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage, StochasticWeightAverage
from tests.networks import CPU_BACKENDS, conv_net, differences, generator, train


def distance_of(averaged: Any, model: nn.Module, *, buffers: bool = False) -> float:
    """The same by torch, in float64."""
    state, total = model.state_dict(), 0.0
    names = dict(model.named_parameters())
    for name, tensor in averaged.module.state_dict().items():
        if (name in names or buffers) and tensor.is_floating_point():
            total += float((tensor.double() - state[name].double()).square().sum())
    return math.sqrt(total)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("kind", [AveragedWeights, ExponentialMovingAverage])
def test_every_nth_step_is_measured(kind: Any, offload: str | None, backend: str | None) -> None:
    model = conv_net()
    averaged = kind(model, 0.1, distance_every=3, offload=offload, backend=backend)
    other = kind(model, 0.1, offload=offload, backend=backend)
    assert averaged.distance is None
    random = generator()
    expected = None
    for step in range(10):
        train(model, random)
        if step and step % 3 == 0:
            expected = step, distance_of(averaged, model)
        averaged.update_parameters(model, asynchronous=True)
        other.update_parameters(model, asynchronous=True)
        for one in (averaged, other):
            one.wait_until_read()
            one.flush()
        found = averaged.distance
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert found.step == expected[0]
            assert found.value == pytest.approx(expected[1], rel=1e-6)
    assert differences(dict(averaged.state_dict()), dict(other.state_dict())) == []


def test_averaged_buffers_count_and_followers_do_not() -> None:
    for buffers in (False, True):
        model = conv_net()
        averaged = StochasticWeightAverage(model, update_buffers=buffers, distance_every=1)
        random = generator()
        averaged.update_parameters(model)
        train(model, random)
        expected = distance_of(averaged, model, buffers=buffers)
        averaged.update_parameters(model)
        assert averaged.distance is not None
        assert averaged.distance.value == pytest.approx(expected, rel=1e-6)


def test_what_is_shared_is_not_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    averaged = AveragedWeights(model, 0.5, share_frozen=True, distance_every=1)
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    averaged.update_parameters(model)
    assert averaged.distance is not None
    assert averaged.distance.value == pytest.approx(math.sqrt(4 * 4 + 4), rel=1e-6)


def test_a_skipped_update_measures_nothing() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, distance_every=1)
    averaged.update_parameters(model)
    train(model, generator())
    averaged.update_parameters(model, found_inf=torch.tensor(1.0))
    assert averaged.distance is None
    averaged.update_parameters(model, found_inf=torch.tensor(0.0))
    assert averaged.distance is not None
    assert averaged.distance.step == 1
    assert averaged.distance.value > 0


def test_a_distance_that_is_not_a_number_is_told() -> None:
    model = nn.Linear(2, 2)
    averaged = ExponentialMovingAverage(model, 0.5, distance_every=1)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    averaged.update_parameters(model)
    assert averaged.distance is not None
    assert math.isnan(averaged.distance.value)


def test_copies_measure_for_themselves() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, distance_every=1)
    averaged.update_parameters(model)
    train(model, generator())
    averaged.update_parameters(model)
    copied = copy.deepcopy(averaged)
    assert copied.distance is None
    copied.update_parameters(model)
    assert copied.distance is not None
    assert copied.distance.step == 2
    assert averaged.distance is not None
    assert averaged.distance.step == 1
