"""Weights by schedule, beside the formulas of those they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ema_fused
from ema_fused.merging import weights_of
from ema_fused.merging.weights import normalised

SIZES = (1, 2, 3, 8, 40)


def as_megatron(rate: Callable[[float], float], n: int) -> list[float]:
    """What schedule_to_merge_coefficients of Megatron-LM's weighted_merge.py computes."""
    if n == 1:
        return [1.0]
    sampled = [rate(k / n) for k in range(n)]
    result = [0.0] * n
    result[n - 1] = sampled[n - 1]
    for k in range(1, n - 1):
        result[k] = sampled[k] - sampled[k + 1]
    result[0] = 1 - sum(result)
    return result


@pytest.mark.parametrize("n", SIZES)
def test_remaining_learning_rates_become_megatron_s_weights(n: int) -> None:
    rates: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1 - x,
        "minus-sqrt": lambda x: 1 - math.sqrt(x),
    }
    for name, rate in rates.items():
        expected = as_megatron(rate, n)
        assert weights_of(name, n) == pytest.approx(expected, abs=1e-15)
        assert weights_of(rate, n) == weights_of(name, n)


def test_minus_sqrt_counts_the_first_most() -> None:
    assert weights_of("minus-sqrt", 4) == pytest.approx([0.5, 0.20711, 0.15892, 0.13397], abs=1e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("schedule", ["mean", "linear", "minus-sqrt", "ema:0.9", "power:0.1"])
def test_weights_sum_to_one_and_none_is_negative(schedule: str, n: int) -> None:
    weights = weights_of(schedule, n, range(100, 100 * n + 1, 100))
    assert len(weights) == n and min(weights) >= 0
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-14)


class OneHot(nn.Module):
    """Its only parameter says which of the checkpoints it is."""

    weight: torch.Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    @torch.no_grad()
    def become(self, number: int) -> OneHot:
        self.weight.zero_()
        self.weight[number] = 1.0
        return self


@pytest.mark.parametrize("n", SIZES)
def test_ema_is_what_torch_s_average_holds(n: int) -> None:
    decay = 0.8
    function = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    model = OneHot(n)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=function)
    for number in range(n):
        averaged.update_parameters(model.become(number))
    held = averaged.module.get_parameter("weight").tolist()
    assert weights_of(f"ema:{decay}", n) == pytest.approx(held, abs=1e-15)


def test_power_is_what_a_power_function_average_holds() -> None:
    n = 6
    model = OneHot(n)
    ema = ema_fused.PowerFunctionEMA(model, sigma_rel=(0.1,))
    for number in range(n):
        ema.update_parameters(model.become(number))
    held = ema.average(0.1)["weight"].tolist()
    assert weights_of("power:0.1", n, range(1, n + 1)) == pytest.approx(held, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "n", "message"),
    [
        ("mean", 0, "n is 0"),
        ("mode", 2, "'mode'; mean, linear"),
        ("ema:often", 2, "a number is expected after the colon"),
        ("ema:1.5", 2, r"1\.5; a number in \[0, 1\]"),
        ("power:0.1", 2, "needs the steps"),
        ("power:0.9", 2, "sigma_rel is 0.9"),
        (lambda x: math.inf, 2, "finite numbers are expected"),
    ],
)
def test_what_is_no_schedule_is_refused(
    schedule: str | Callable[[float], float], n: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of(schedule, n)


def test_steps_rise_and_are_as_many_as_checkpoints() -> None:
    for steps in ([0, 1], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match="rising numbers above 0"):
            weights_of("power:0.1", 2, steps)
    with pytest.raises(ValueError, match="steps has 3 items for 2"):
        weights_of("power:0.1", 2, [1, 2, 3])
    with pytest.raises(TypeError, match="or a function"):
        weights_of(3, 2)  # type: ignore[arg-type]


def test_normalised_weights_sum_to_one_or_are_refused() -> None:
    assert normalised([2, 6]) == [0.25, 0.75]
    with pytest.raises(ValueError, match="sum to 0 and can't be divided"):
        normalised([1, -1])
    with pytest.raises(ValueError, match="finite numbers"):
        normalised([1, math.nan])
