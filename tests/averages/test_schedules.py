"""Momentum schedules: their formulas at known points, their ends, their refusals."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_fused import ExponentialMovingAverage
from ema_fused.averages import schedules
from ema_fused.averages.schedules import (
    annealing,
    constant,
    copy_first,
    cosine,
    delayed_warmup_ratio,
    ema_decay_sqrt,
    exponential,
    half_life_fraction,
    half_life_ramp_up,
    in_steps,
    inverse_power,
    linear_warmup,
    mean,
    momentum_of_half_life,
    power_function,
    scale_momentum,
    warmup_exponential,
    warmup_power,
    warmup_ratio,
)
from tests.networks import conv_net, differences, run, snapshot

ALL = {
    "constant": partial(constant, momentum=0.25),
    "annealing": partial(annealing, momentum=0.01, gamma=20),
    "exponential": partial(exponential, momentum=0.01, gamma=20),
    "linear_warmup": partial(linear_warmup, momentum=0.5, warm_up=10),
    "inverse_power": partial(inverse_power, lag=1, power=0.75),
    "cosine": partial(cosine, start=0.3, end=0.1, total=50),
    "mean": mean,
    "warmup_power": partial(warmup_power, momentum=0.01, gamma=3, power=0.75, after=4),
    "warmup_ratio": partial(warmup_ratio, momentum=0.01),
    "delayed_warmup_ratio": partial(delayed_warmup_ratio, momentum=0.01, after=4),
    "warmup_exponential": partial(warmup_exponential, momentum=0.01, tau=30),
    "half_life_ramp_up": partial(half_life_ramp_up, half_life=500, batch_size=16),
    "half_life_fraction": half_life_fraction,
    "copy_first": partial(copy_first, updates=5, then=partial(annealing, momentum=0.01, gamma=20)),
    "power_function": partial(power_function, sigma_rel=0.05),
    "ema_decay_sqrt": partial(ema_decay_sqrt, momentum=0.02, switch=20, total=60),
}
# Those whose memory grows from nothing: the first value is a copy, and none outweighs the last.
FALLING = [
    name for name in ALL if name not in ("constant", "linear_warmup", "cosine", "ema_decay_sqrt")
]


def test_annealing_falls_as_a_hyperbola_down_to_its_momentum() -> None:
    assert annealing(0) == 1.0
    assert annealing(100) == 0.5
    assert annealing(300) == 0.25
    assert annealing(5, momentum=0.75, gamma=5) == 0.75
    # 100 / (100 + step) meets 0.0002 at step 499,900.
    assert annealing(499_899) > 0.0002
    assert annealing(499_900) == pytest.approx(0.0002)
    assert annealing(600_000) == 0.0002


def test_exponential_falls_with_its_time_constant() -> None:
    assert exponential(0) == (1 - 0.0002) * math.exp(-1 / 2000) + 0.0002
    assert exponential(9, momentum=0.0, gamma=10) == pytest.approx(1 / math.e)
    assert exponential(10**6, momentum=0.01, gamma=10) == 0.01


def test_inverse_power_falls_with_the_steps_and_those_before() -> None:
    assert inverse_power(6) == 0.25
    assert inverse_power(0, before=6) == 0.25
    assert inverse_power(3, power=1, lag=0, multiplier=2) == 1 / 6
    assert inverse_power(10**6, least=0.1) == 0.1
    assert inverse_power(5, power=0) == 1.0
    with pytest.raises(ValueError, match="is 0 at step 0, which has no inverse power"):
        inverse_power(0, lag=0)


@pytest.mark.parametrize(("switch", "total"), [(0, 1), (0, 7), (5, 40), (300, 1000), (9, 5)])
def test_ema_decay_sqrt_is_levanter_s(switch: int, total: int) -> None:
    beta, summed = 0.98, 0.0
    for step in range(switch + total + 5):
        # EmaDecaySqrtModelAveraging: the weight of this value, and of all so far.
        share = min(1.0, max(0, step - switch) / total)
        weight = 1 - beta if step < switch else 1 - math.sqrt(share)
        summed += weight
        found = ema_decay_sqrt(step, momentum=1 - beta, switch=switch, total=total)
        assert found == pytest.approx(weight / summed, rel=1e-9, abs=1e-15)
    assert found == 0.0


def test_ema_decay_sqrt_needs_a_weight_before_the_switch() -> None:
    with pytest.raises(ValueError, match="momentum"):
        ema_decay_sqrt(1, momentum=0.0, switch=5, total=9)


def test_linear_warmup_rises_to_its_momentum() -> None:
    assert linear_warmup(0, momentum=0.5, warm_up=10) == 0.1
    assert linear_warmup(5, momentum=0.5, warm_up=10) == 0.4
    assert linear_warmup(8, momentum=0.5, warm_up=10) == 0.5
    assert linear_warmup(1000, momentum=0.5, warm_up=10) == 0.5
    for warm_up in (0, 0.5, 1):  # none: the ratio is never below 1
        for step in (0, 1, 9):
            assert linear_warmup(step, momentum=0.5, warm_up=warm_up) == 0.5


def test_linear_warmup_is_constant_with_the_defaults() -> None:
    assert {linear_warmup(step) for step in range(500)} == {0.0002}


def test_cosine_goes_from_start_to_end_and_stays() -> None:
    between = partial(cosine, start=0.3, end=0.1, total=50)
    assert between(0) == 0.3
    assert between(25) == pytest.approx(0.2)
    assert between(50) == between(51) == between(10**6) == 0.1
    values = [between(step) for step in range(51)]
    assert values == sorted(values, reverse=True)


def test_cosine_starts_and_ends_flat() -> None:
    steps = [cosine(k, start=1.0, end=0.0, total=100) for k in range(101)]
    changes = [a - b for a, b in itertools.pairwise(steps)]
    assert max(changes) == pytest.approx(math.pi / 200, rel=1e-3)
    assert changes[0] == pytest.approx(changes[-1]) == pytest.approx(math.pi**2 / 40_000, rel=1e-2)


def test_mean_weighs_all_values_alike() -> None:
    average = 0.0
    values = [3.0, 5.0, -1.0, 9.0, 4.0]
    for step, value in enumerate(values):
        average += mean(step) * (value - average)
    assert average == pytest.approx(sum(values) / len(values))


def test_warmup_power_waits_falls_and_is_held() -> None:
    warmup = partial(warmup_power, momentum=0.05, largest=0.5, gamma=2, power=0.5, after=10)
    assert {warmup(step) for step in range(12)} == {1.0}
    assert warmup(12) == 0.5  # sqrt(2 / 3) is larger
    assert warmup(41) == pytest.approx(0.25)  # s = 30: (1 + 15) ** -0.5
    assert warmup(808) > 0.05
    assert warmup(809) == pytest.approx(0.05)  # s = 798: (1 + 399) ** -0.5
    assert warmup(10**6) == 0.05
    # The table in ema-pytorch's documentation: decay 0.999 at 31,600 steps, 0.9999 at a million.
    long = partial(warmup_power, momentum=0.0)
    assert 1 - long(31_601) == pytest.approx(0.999, abs=1e-6)
    assert 1 - long(1_000_001) == pytest.approx(0.9999, abs=1e-9)


def test_warmup_ratio_counts_ten_before_the_first() -> None:
    assert warmup_ratio(0) == 0.9
    assert warmup_ratio(8) == 0.5
    assert warmup_ratio(80, momentum=0.2) == 0.2
    delayed = partial(delayed_warmup_ratio, momentum=0.2, largest=0.75, after=3)
    assert [delayed(step) for step in (0, 4, 5, 7, 12, 1000)] == [
        1.0,
        1.0,
        0.75,
        9 / 13,
        0.5,
        0.2,
    ]


def test_warmup_exponential_forgets_the_start() -> None:
    assert warmup_exponential(0) == 1.0
    assert warmup_exponential(2000) == pytest.approx(1 - 0.9999 * (1 - 1 / math.e))
    assert warmup_exponential(10**6, momentum=0.25, tau=5) == 0.25


def test_half_life_is_where_a_weight_is_halved() -> None:
    momentum = momentum_of_half_life(100)
    assert (1 - momentum) ** 100 == pytest.approx(0.5)
    # In samples: 250 steps of 8.
    assert (1 - momentum_of_half_life(2000, batch_size=8)) ** 250 == pytest.approx(0.5)
    assert momentum_of_half_life(1e12) == pytest.approx(math.log(2) * 1e-12, rel=1e-12)


def test_half_life_ramps_up_with_the_samples_seen() -> None:
    ramp = partial(half_life_ramp_up, half_life=1000, batch_size=10, ratio=0.1)
    assert ramp(0) == 1.0
    assert ramp(1) == pytest.approx(1 - 0.5**10)
    assert ramp(100) == pytest.approx(1 - 0.5**0.1)
    assert ramp(1000) == ramp(10**7) == pytest.approx(1 - 0.5**0.01)


def test_power_function_is_beta_of_the_time_after_the_update() -> None:
    # gamma = 6.94 is the paper's number for a width of 0.1, and 16.97 for 0.05.
    assert power_function(0) == 1.0
    assert power_function(9) == pytest.approx(1 - 0.9**7.937203937601806)
    assert power_function(9, sigma_rel=0.05) == pytest.approx(1 - 0.9**17.97219860230345)
    assert power_function(10**9) == pytest.approx(7.937203937601806e-9, rel=1e-8)


def test_scaled_momentum_forgets_as_fast_per_sample() -> None:
    assert scale_momentum(0.5, 2) == pytest.approx(0.75)
    assert (1 - scale_momentum(0.001, 8)) == pytest.approx(0.999**8)
    assert scale_momentum(scale_momentum(0.1, 4), 0.25) == pytest.approx(0.1)
    assert scale_momentum(0.0, 3) == 0.0
    assert scale_momentum(1.0, 3) == 1.0
    for half_life in (7.0, 1000.0):
        scaled = scale_momentum(momentum_of_half_life(half_life), 16)
        assert scaled == pytest.approx(momentum_of_half_life(half_life, batch_size=16))


def test_a_half_life_can_be_a_fraction_of_the_run_so_far() -> None:
    # torchtitan's formula, which counts the updates with this one.
    for fraction, bias in ((0.05, 0), (0.05, 7), (0.2, -3), (1.0, 0)):
        for step in (0, 1, 2, 19, 99, 10**6):
            updates = max(step + 1 + bias, 1)
            expected = 1 - 2.0 ** (-1.0 / (fraction * updates))
            found = half_life_fraction(step, fraction=fraction, step_bias=bias)
            assert found == pytest.approx(expected, rel=1e-9)
    assert half_life_fraction(19) == 0.5  # a half-life of one step
    # What was seen before the last fraction of a long run has half the weight.
    kept = math.prod(1 - half_life_fraction(step) for step in range(9_500, 10_000))
    assert kept == pytest.approx(2 ** -(math.log(10_000 / 9_500) / 0.05), rel=1e-4)
    assert half_life_fraction(4, step_bias=-100) == half_life_fraction(0)


def test_or_of_a_run_of_known_length() -> None:
    of_run = partial(half_life_fraction, fraction=0.03, total=10_000)
    assert {of_run(step) for step in (0, 7, 10**6)} == {momentum_of_half_life(300)}
    with pytest.raises(TypeError, match=r"step_bias is 1\.5; an integer"):
        half_life_fraction(1, step_bias=1.5)


def test_the_first_updates_copy() -> None:
    seen = []

    def then(step: int) -> float:
        seen.append(step)
        return 0.25

    first = partial(copy_first, updates=3, then=then)
    assert [first(step) for step in range(6)] == [1.0, 1.0, 1.0, 0.25, 0.25, 0.25]
    assert seen[3:] == [1, 2, 3]
    assert [copy_first(step, updates=2, then=0.5) for step in range(4)] == [1.0, 1.0, 0.5, 0.5]
    for updates in (0, 1):
        assert [copy_first(step, updates=updates, then=0.5) for step in (0, 1)] == [1.0, 0.5]
    found = copy_first(torch.tensor(2.0, dtype=torch.float64), updates=2, then=0.5)
    assert isinstance(found, Tensor) and found == 0.5
    with pytest.raises(TypeError, match=r"updates is 1\.5"):
        copy_first(1, updates=1.5, then=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="then is 'x'"):
        copy_first(1, updates=1, then="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("updates", [0, 1, 2, 5])
@pytest.mark.parametrize("capturable", [False, True])
def test_copying_first_is_as_beginning_later(updates: int, capturable: bool) -> None:
    fall = partial(annealing, momentum=0.01, gamma=3)
    models = conv_net(), conv_net()
    scheduled = ExponentialMovingAverage(
        models[0], partial(copy_first, updates=updates, then=fall), capturable=capturable
    )
    begun = ExponentialMovingAverage(models[1], fall, begin_step=updates, capturable=capturable)
    run(scheduled, models[0], 8)
    run(begun, models[1], 8)
    assert differences(snapshot(scheduled.module), snapshot(begun.module)) == []


def test_durations_are_told_in_other_units() -> None:
    assert in_steps(samples=256_000, batch_size=256) == 1000
    assert in_steps(tokens=2e9, tokens_per_step=4_000_000) == 500
    assert in_steps(epochs=1.5, steps_per_epoch=1251) == 1876.5
    # 5 % of a run of 10 epochs, and the same in samples.
    of_epochs = half_life_fraction(0, total=in_steps(epochs=10, steps_per_epoch=100))
    assert of_epochs == momentum_of_half_life(in_steps(samples=50 * 32, batch_size=32))
    for wrong, message in (
        ({}, "got nothing; one of samples="),
        ({"samples": 5}, "got samples=5; one of"),
        ({"batch_size": 5}, "got batch_size=5; one of"),
        ({"samples": 5, "tokens_per_step": 3}, "got samples=5, tokens_per_step=3; one"),
        (
            {"samples": 5, "batch_size": 5, "epochs": 1, "steps_per_epoch": 2},
            "got samples=5, batch_size=5, epochs=1, steps_per_epoch=2; one",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            in_steps(**wrong)
    with pytest.raises(ValueError, match="batch_size is 0; a finite number above 0"):
        in_steps(samples=5, batch_size=0)


@pytest.mark.parametrize("name", FALLING)
def test_a_warm_up_begins_with_much_and_falls(name: str) -> None:
    values = [ALL[name](step) for step in range(2000)]
    assert values[0] > 0.89
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", ALL)
def test_every_value_is_a_weight(name: str) -> None:
    values = [ALL[name](step) for step in range(2000)]
    assert all(0.0 <= value <= 1.0 for value in values)


@pytest.mark.parametrize("name", ALL)
def test_a_negative_step_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="step is -1"):
        ALL[name](-1)


@pytest.mark.parametrize(
    ("schedule", "wrong"),
    [
        (constant, {"momentum": 1.5}),
        (constant, {"momentum": math.nan}),
        (annealing, {"momentum": -0.1}),
        (annealing, {"gamma": 0}),
        (exponential, {"momentum": 2.0}),
        (exponential, {"gamma": -1}),
        (exponential, {"gamma": math.inf}),
        (linear_warmup, {"momentum": -1.0}),
        (linear_warmup, {"warm_up": -1}),
        (linear_warmup, {"warm_up": math.inf}),
        (cosine, {"start": 1.1, "total": 5}),
        (cosine, {"end": -0.1, "total": 5}),
        (cosine, {"total": 0}),
        (warmup_power, {"momentum": 1.5}),
        (warmup_power, {"largest": -0.5}),
        (warmup_power, {"gamma": 0}),
        (warmup_power, {"power": -1}),
        (warmup_power, {"after": -1}),
        (warmup_ratio, {"momentum": -1}),
        (delayed_warmup_ratio, {"largest": 2}),
        (delayed_warmup_ratio, {"after": -2}),
        (warmup_exponential, {"tau": 0}),
        (half_life_ramp_up, {"half_life": 0}),
        (half_life_ramp_up, {"ratio": 0, "half_life": 5}),
        (half_life_ramp_up, {"batch_size": 0, "half_life": 5}),
        (half_life_fraction, {"fraction": 0}),
        (half_life_fraction, {"total": -5}),
        (copy_first, {"updates": -1}),
        (copy_first, {"then": 1.5, "updates": 1}),
        (power_function, {"sigma_rel": 0.0}),
        (power_function, {"sigma_rel": 0.28868}),
        (power_function, {"sigma_rel": math.nan}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value)),
)
def test_arguments_out_of_range_are_named(schedule: Any, wrong: dict[str, float]) -> None:
    first = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{first} is .*expected"):
        schedule(3, **wrong)


@pytest.mark.parametrize(
    ("helper", "arguments", "named"),
    [
        (momentum_of_half_life, (0.0,), "half_life is 0.0"),
        (momentum_of_half_life, (math.inf,), "half_life is inf"),
        (scale_momentum, (1.5, 2), "momentum is 1.5"),
        (scale_momentum, (0.5, 0), "kappa is 0"),
    ],
)
def test_helpers_name_what_is_out_of_range(helper: Any, arguments: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*expected"):
        helper(*arguments)


def test_half_cosine_ends_exactly() -> None:
    assert schedules.half_cosine(0.0, 0.3, 0.1) == 0.3
    assert schedules.half_cosine(math.pi, 0.3, 0.1) == 0.1


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_gives_the_same_momentum_as_a_number(name: str) -> None:
    for step in (0, 1, 2, 3, 4, 5, 6, 7, 20, 49, 50, 51, 100, 100_000):
        found = ALL[name](torch.tensor(float(step), dtype=torch.float64))
        if isinstance(found, Tensor):
            assert found.dtype == torch.float64 and found.dim() == 0
        assert float(found) == pytest.approx(ALL[name](step), rel=1e-13)
