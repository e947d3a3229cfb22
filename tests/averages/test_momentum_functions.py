"""Momenta that are functions of the step, used as people use them: decays, no numbers, NumPy's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ema_fused.averages import schedules
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from tests.networks import Weight, conv_net, differences, run, snapshot, values_of

DECAYS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.999,
    "torch-ema": lambda step: min(0.9999, (1 + step) / (10 + step)),
    "power": lambda step: 1 - (1 + step) ** (-2 / 3),
    "ultralytics": lambda step: 0.9999 * (1 - math.exp(-step / 3)),
    "byol": lambda step: 1 - (1 - 0.996) * (math.cos(math.pi * step / 100) + 1) / 2,
    "linear": lambda step: min(0.99, 0.6 + step / 100),
}
MOMENTA: dict[str, Callable[[int], float]] = {
    "annealing": partial(schedules.annealing, gamma=1000),
    "exponential": partial(schedules.exponential, gamma=2000),
    "power": partial(schedules.warmup_power, gamma=100.0),
    "copies first": partial(schedules.warmup_power, after=20),
    "exponential warm-up": schedules.warmup_exponential,
    "half-life": partial(schedules.half_life_ramp_up, half_life=5000, ratio=0.05),
    "linear": partial(schedules.linear_warmup, momentum=0.5, warm_up=30),
    "power function": partial(schedules.power_function, sigma_rel=0.02),
    "always copied": lambda step: 1.0,
    "small": lambda step: 0.001,
}


@pytest.mark.parametrize("options", [{}, {"interval": 3}, {"every": 4}], ids=str)
@pytest.mark.parametrize("name", DECAYS)
def test_a_schedule_of_decays_is_warned_of_once(name: str, options: dict[str, Any]) -> None:
    averaged = ExponentialMovingAverage(Weight(), DECAYS[name], **options)
    model = Weight()
    with pytest.warns(UserWarning, match=r"at step 1\d, and it doesn't fall") as caught:
        for _ in range(40):
            averaged.update_parameters(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__ or "every" in options
    assert "momentum=lambda step: 1 - decay(step)" in str(caught[0].message)


@pytest.mark.parametrize("name", MOMENTA)
def test_schedules_of_momenta_are_not(name: str) -> None:
    averaged = ExponentialMovingAverage(Weight(), MOMENTA[name])
    model = Weight()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            averaged.update_parameters(model)
    assert averaged.steps == 40


@pytest.mark.parametrize(
    "kind",
    [
        StochasticWeightAverage,
        partial(MomentumAnnealingEMA, gamma=5000),
        partial(ExpMomentumEMA, gamma=5000),
        partial(CosineEMA, momentum=0.4, max_iters=30),
    ],
)
def test_nor_are_kinds_with_schedules_of_their_own(kind: Any) -> None:
    averaged, model = kind(Weight()), Weight()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            averaged.update_parameters(model)


def test_a_number_is_warned_of_where_it_is_given_alone() -> None:
    with pytest.warns(UserWarning, match=r"would be momentum=0\.001"):
        averaged = ExponentialMovingAverage(Weight(), 0.999)
    model = Weight()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            averaged.update_parameters(model)


def test_a_number_that_is_set_later_is_looked_at_too() -> None:
    averaged, model = ExponentialMovingAverage(Weight(), 0.001), Weight()
    for _ in range(3):
        averaged.update_parameters(model)
    averaged.momentum = 0.999
    with pytest.warns(UserWarning, match=r"has momentum 0\.999 at step 10, and it doesn't fall"):
        for _ in range(20):
            averaged.update_parameters(model)


def test_a_warning_that_is_an_error_leaves_the_average_alone() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, lambda step: 0.999)
    run(averaged, model, 10)
    before = snapshot(averaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="doesn't fall"):
            run(averaged, model, 1)
    assert differences(snapshot(averaged), before) == []


@pytest.mark.parametrize(
    "returned",
    [
        np.float32(0.25),
        np.float64(0.25),
        np.array(0.25),
        torch.tensor(0.25),
        torch.tensor([0.25]),
        torch.tensor(0.25, requires_grad=True),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_what_others_call_numbers_are_numbers(returned: Any) -> None:
    assert values_of(ExponentialMovingAverage(Weight(), lambda step: returned), [0.0, 4.0]) == [
        0,
        1,
    ]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("returned", [None, "fast", [0.1], {"": 0.1}, math.nan, 0.1j], ids=repr)
def test_what_is_no_number_is_named(returned: Any, capturable: bool) -> None:
    averaged = ExponentialMovingAverage(Weight(), lambda step: returned, capturable=capturable)
    model = Weight(2.0)
    averaged.update_parameters(model)
    with pytest.raises(
        (TypeError, ValueError),
        match=r"^ExponentialMovingAverage has momentum .* (at step 1|now); a number in \[0, 1\] is",
    ):
        averaged.update_parameters(model.set_to(3.0))
    assert averaged.module.weight == 2.0 and averaged.steps == 1


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda: 0.1, "too many positional arguments"),
        (schedules.cosine, "missing a required argument: 'total'"),
        (partial(schedules.cosine, total_steps=9), "has incorrect arguments"),
        (torch.optim.swa_utils.get_ema_avg_fn(0.999), "missing a required argument"),
    ],
)
def test_a_function_that_takes_no_step_is_refused_where_it_is_given(
    function: Any, why: str
) -> None:
    with pytest.raises(TypeError, match=rf"momentum is .* with a step alone \(.*{why}"):
        ExponentialMovingAverage(Weight(), function)
    with pytest.raises(TypeError, match=rf"momentum of '' is .* with a step alone \(.*{why}"):
        ExponentialMovingAverage(Weight(), {"": function})


def test_functions_without_a_signature_are_taken() -> None:
    class Table(list[float]):
        __call__ = list.__getitem__

    for function in (Table([1.0, 0.25]).__getitem__, Table([1.0, 0.25])):
        assert values_of(ExponentialMovingAverage(Weight(), function), [0.0, 4.0]) == [0, 1]


def test_a_function_that_forgets_to_return_in_a_class() -> None:
    class Forgetful(BaseAveragedModel):
        def momentum_at(self, steps: int) -> None:
            0.5 / steps

    averaged, model = Forgetful(nn.Linear(1, 1)), nn.Linear(1, 1)
    averaged.update_parameters(model)
    with pytest.raises(TypeError, match="Forgetful has momentum None at step 1"):
        averaged.update_parameters(model)
