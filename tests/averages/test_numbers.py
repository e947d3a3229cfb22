"""A tensor or an array of one number, and NumPy's, are numbers: read once, when it is made."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import ema_fused
from ema_fused import Plan, PowerFunctionEMA, StochasticWeightAverage
from ema_fused.averages import schedules
from ema_fused.averages.kinds import (
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
)
from ema_fused.engine.checks import WrongTypeError, WrongValueError, plain
from tests.networks import Weight, differences, snapshot, values_of

WAYS = [
    torch.tensor,
    lambda value: torch.tensor([value]),
    lambda value: torch.tensor(value, requires_grad=isinstance(value, float)),
    lambda value: np.array(value)[()],
    np.array,
    lambda value: np.array([[value]]),
]
IDS = ["tensor", "one-element", "learned", "numpy", "array", "2-d"]
# 0.25 and the like are the same in float32.
ARGUMENTS: list[tuple[Any, dict[str, float]]] = [
    (StochasticWeightAverage, {"interval": 2, "begin_step": 2}),
    (ExponentialMovingAverage, {"momentum": 0.25, "interval": 2}),
    (ExponentialMovingAverage, {"momentum": 0.25, "every": 3, "distance_every": 3}),
    (MomentumAnnealingEMA, {"momentum": 0.25, "gamma": 3}),
    (ExpMomentumEMA, {"momentum": 0.25, "gamma": 2.5}),
    (CosineEMA, {"momentum": 0.25, "end_momentum": 0.125, "max_iters": 6}),
    (CosineEMA, {"momentum": 0.25, "end_momentum": 1, "max_iters": 6}),
]


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize(("kind", "arguments"), ARGUMENTS)
def test_it_is_kept_as_a_plain_number_and_no_step_reads_it_again(
    kind: Any, arguments: dict[str, float], way: Any
) -> None:
    given = {name: way(value) for name, value in arguments.items()}
    averaged, plainly = kind(Weight(), **given), kind(Weight(), **arguments)
    for name, value in arguments.items():
        found = getattr(averaged, name, value)
        assert type(found) is type(value) and found == value
    held = [value for value in vars(averaged).values() if hasattr(value, "item")]
    assert held == []
    model = Weight()
    for value in (1.0, 2.0, 4.0, 8.0, 16.0):
        for each in (averaged, plainly):
            each.update_parameters(model.set_to(value))
    assert differences(snapshot(averaged), snapshot(plainly)) == []
    assert not torch.equal(averaged.module.weight, model.weight)
    assert repr(averaged) == repr(plainly)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_so_are_seeds_widths_samples_and_weights_of_the_average(way: Any) -> None:
    model = Weight()
    assert ExponentialMovingAverage(model, rounding="stochastic", seed=way(7)).rounding_seed == 7
    assert Plan([torch.zeros(2)], [torch.ones(2)], seed=way(7)).seed == 7
    kept = PowerFunctionEMA(model, way(0.125))
    assert kept.sigma_rel == (0.125,)
    kept.update_parameters(model, samples=way(4))
    assert type(kept.time) is int and kept.time == 4
    assert schedules.annealing(9, momentum=way(0.25), gamma=way(3)) == 0.25
    averaged = ExponentialMovingAverage(Weight(), partial(schedules.constant, momentum=way(0.5)))
    assert values_of(averaged, [0.0, 8.0]) == [0.0, 4.0]


def test_what_is_no_number_of_one_s_own_is_refused() -> None:
    wrong: list[Any] = [torch.zeros(2), torch.zeros(0), np.zeros(2), torch.tensor(1j), "1", None]
    wrong += [True, torch.tensor(True), np.bool_(True), torch.zeros((), device="meta"), [0.5]]
    for value in wrong:
        assert plain(value) is None
        for name in ("momentum", "interval"):
            with pytest.raises(WrongTypeError, match=f"^{name} is .* is expected$"):
                ExponentialMovingAverage(Weight(), **{name: value})
    assert plain(Fraction(1, 4)) == 0.25


def test_integers_are_whole_numbers_of_any_type() -> None:
    assert type(ExponentialMovingAverage(Weight(), interval=2.0).interval) is int  # type: ignore[arg-type]
    for value in (2.5, 0.5, float("nan"), float("inf"), np.float32(1.5)):
        with pytest.raises(WrongTypeError, match=r"interval is .*; an integer is expected"):
            ExponentialMovingAverage(Weight(), interval=value)  # type: ignore[arg-type]
    with pytest.raises(WrongValueError, match="interval is 0; at least 1 is expected"):
        ExponentialMovingAverage(Weight(), interval=torch.tensor(0.0))  # type: ignore[arg-type]


def test_errors_are_assertions_too_and_still_what_they_were() -> None:
    """OpenMMLab's classes assert their arguments, and code around them expects that."""
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match="momentum is 3; a number in"):
            ema_fused.ExponentialMovingAverage(Weight(), 3)
    for error in (AssertionError, TypeError):
        with pytest.raises(error, match="gamma is None; a finite number above 0"):
            MomentumAnnealingEMA(Weight(), gamma=None)  # type: ignore[arg-type]
