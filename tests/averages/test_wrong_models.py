"""Averages of averages, and averages that are parts of their own model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.kinds import ExponentialMovingAverage
from tests.networks import conv_net, differences, generator, run, snapshot, train


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_an_average_may_be_averaged(kind: Any) -> None:
    model = conv_net()
    first = ExponentialMovingAverage(model, 0.5)
    second = kind(first, 0.5)
    expected = ExponentialMovingAverage(first.module, 0.5)
    random = generator()
    for _ in range(4):
        train(model, random)
        first.update_parameters(model)
        second.update_parameters(first)
        expected.update_parameters(first.module)
    inner = {
        name.removeprefix("module."): tensor
        for name, tensor in second.module.state_dict().items()
        if name != "steps"
    }
    assert differences(inner, expected.module.state_dict()) == []
    assert second.steps == first.steps == 4


def test_the_average_in_place_of_the_model_is_named() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    run(averaged, model, 2)
    before = snapshot(averaged)
    for action in (averaged.update_parameters, averaged.copy_from):
        with pytest.raises(KeyError, match=r"is an averaged model itself.*or model\.module"):
            action(averaged)
    assert differences(snapshot(averaged), before) == []


def test_a_module_that_averages_itself_is_told_to_average_a_part() -> None:
    class Learner(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.network = conv_net()
            self.average = ExponentialMovingAverage(self if whole else self.network, 0.5)

    learner = Learner(whole=True)
    with pytest.raises(KeyError, match="has this average as one of its parts"):
        learner.average.update_parameters(learner)
    learner = Learner(whole=False)
    learner.average.update_parameters(learner.network)
    other = copy.deepcopy(learner)
    other.average.update_parameters(other.network)
    assert (int(learner.average.steps), int(other.average.steps)) == (1, 2)


@pytest.mark.parametrize("device", [torch.float16, nn.Linear(1, 1), [0]], ids=str)
def test_what_is_no_device_is_named(device: Any) -> None:
    with pytest.raises(TypeError, match=r"device is .*; a torch\.device, or its name, is expected"):
        ExponentialMovingAverage(conv_net(), 0.5, 1, device)
