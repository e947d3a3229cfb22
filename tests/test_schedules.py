"""Momentum schedules: their formulas at known points, their ends, their refusals."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest

from ema_fused import schedules
from ema_fused.schedules import annealing, constant, cosine, exponential, linear_warmup

ALL = {
    "constant": partial(constant, momentum=0.25),
    "annealing": partial(annealing, momentum=0.01, gamma=20),
    "exponential": partial(exponential, momentum=0.01, gamma=20),
    "linear_warmup": partial(linear_warmup, momentum=0.5, warm_up=10),
    "cosine": partial(cosine, start=0.3, end=0.1, total=50),
}


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


def test_linear_warmup_rises_to_its_momentum() -> None:
    assert linear_warmup(0, momentum=0.5, warm_up=10) == 0.1
    assert linear_warmup(5, momentum=0.5, warm_up=10) == 0.4
    assert linear_warmup(8, momentum=0.5, warm_up=10) == 0.5
    assert linear_warmup(1000, momentum=0.5, warm_up=10) == 0.5


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
        (linear_warmup, {"warm_up": 0}),
        (cosine, {"start": 1.1, "total": 5}),
        (cosine, {"end": -0.1, "total": 5}),
        (cosine, {"total": 0}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value)),
)
def test_arguments_out_of_range_are_named(schedule: Any, wrong: dict[str, float]) -> None:
    first = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{first} is .*expected"):
        schedule(3, **wrong)


def test_half_cosine_ends_exactly() -> None:
    assert schedules.half_cosine(0.0, 0.3, 0.1) == 0.3
    assert schedules.half_cosine(math.pi, 0.3, 0.1) == 0.1
