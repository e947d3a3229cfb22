"""Averages of lazy layers get their shapes with the model's first batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage, attach
from tests.networks import differences, run, snapshot

KINDS = [ExponentialMovingAverage, AveragedWeights]


def lazy_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"averaged_dtype": torch.float64},
        {"share_frozen": True},
        {"begin_step": 3},
        {"update_buffers": True},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_after_a_batch_allocates_the_average(
    kind: type[ExponentialMovingAverage], options: dict[str, Any]
) -> None:
    model = lazy_net()
    averaged = kind(model, 0.25, **options)
    message = r"'0\.weight' of the model has no elements yet.* Run one batch through the model"
    with pytest.raises(ValueError, match=message):
        averaged.update_parameters(model)
    with pytest.raises(ValueError, match=message):
        averaged.copy_to(model)
    model(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"'0\.weight' of the average has no elements yet"):
        averaged.copy_to(model)
    other = kind(model, 0.25, **options)
    reference = copy.deepcopy(model)
    run(averaged, model, 5)
    run(other, reference, 5)
    assert differences(snapshot(averaged), snapshot(other)) == []
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    with averaged.swapped(model):
        model(torch.randn(4, 5))


def test_an_attached_average_is_a_module_of_ordinary_layers() -> None:
    model = lazy_net()
    averaged = ExponentialMovingAverage(model, 0.25)
    images = torch.randn(4, 5)
    model(images)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, model, averaged):
        for _ in range(2):
            model(images).sum().backward()
            optimizer.step()
    assert type(averaged.module[0]) is nn.Linear
    assert int(averaged.steps) == 2
    assert averaged(images).shape == (4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_average_loads_before_the_first_batch(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = lazy_net()
    model(torch.randn(4, 5))
    averaged = kind(model, 0.25)
    run(averaged, model, 3)
    resumed = lazy_net()
    ours = kind(resumed, 0.25)
    ours.load_state_dict(averaged.state_dict())
    assert differences(snapshot(ours), snapshot(averaged)) == []
    resumed(torch.randn(4, 5))
    resumed.load_state_dict(model.state_dict())
    run(ours, resumed, 2)
    run(averaged, model, 2)
    assert differences(snapshot(ours), snapshot(averaged)) == []
