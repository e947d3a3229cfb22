"""Keywords that other libraries use, and misspelt ones: the message says what is meant here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.posthoc.power_function import PowerFunctionEMA
from tests.networks import Weight

WITH_MOMENTUM = [
    ExponentialMovingAverage,
    AveragedWeights,
    MomentumAnnealingEMA,
    ExpMomentumEMA,
    CosineEMA,
]


def refusal(kind: Any, **keywords: Any) -> str:
    with pytest.raises(TypeError) as raised:
        kind(Weight(), **keywords)
    return str(raised.value)


@pytest.mark.parametrize("kind", WITH_MOMENTUM)
@pytest.mark.parametrize("name", ["decay", "ema_decay", "ema_rate", "beta", "alpha"])
@pytest.mark.parametrize(("decay", "momentum"), [(0.999, "0.001"), (0.9999, "0.0001")])
def test_a_decay_is_told_as_a_momentum(kind: Any, name: str, decay: float, momentum: str) -> None:
    message = refusal(kind, **{name: decay})
    assert message.startswith(f"{kind.__name__}() got an unexpected keyword argument '{name}': ")
    assert f"pass momentum={momentum}, the weight of the model's values, 1 - {name}." in message
    kind(Weight(), momentum=float(momentum), **({"max_iters": 9} if kind is CosineEMA else {}))


@pytest.mark.parametrize("kind", [StochasticWeightAverage, PowerFunctionEMA])
def test_a_kind_without_a_momentum_names_the_one_that_has_it(kind: Any) -> None:
    expected = "take ExponentialMovingAverage(model, momentum=0.001)"
    assert expected in refusal(kind, decay=0.999)
    assert "take ExponentialMovingAverage, which has a momentum" in refusal(kind, momentum=0.001)


@pytest.mark.parametrize("name", ["alpha", "tau"])
def test_a_small_number_that_others_take_for_the_new_value_stays_as_it_is(name: str) -> None:
    message = refusal(ExponentialMovingAverage, **{name: 0.005})
    assert "pass momentum=0.005, the weight of the model's values. It takes" in message


def test_gamma_is_a_decay_or_belongs_to_another_kind() -> None:
    assert "momentum=0.01" in refusal(ExponentialMovingAverage, gamma=0.99)
    assert "MomentumAnnealingEMA and ExpMomentumEMA have a gamma" in refusal(
        ExponentialMovingAverage, gamma=100
    )
    assert MomentumAnnealingEMA(Weight(), gamma=50).gamma == 50


def test_a_decay_may_be_no_number() -> None:
    expected = "momentum=lambda step: 1 - decay(step)"
    assert expected in refusal(ExponentialMovingAverage, decay=lambda step: 0.9)
    assert "momentum=1 - decay," in refusal(ExponentialMovingAverage, decay="0.999")
    assert "momentum=0.5," in refusal(ExponentialMovingAverage, decay=torch.tensor(0.5))


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("intervall", "interval"),
        ("momentun", "momentum"),
        ("update_buffer", "update_buffers"),
        ("use_buffers", "update_buffers"),
        ("update_every", "every"),
        ("dtype", "averaged_dtype"),
        ("update_after_step", "begin_step"),
    ],
)
def test_a_close_name_is_offered(keyword: str, meant: str) -> None:
    assert f": perhaps {meant} is meant. It takes" in refusal(
        ExponentialMovingAverage, **{keyword: 1}
    )


def test_a_warm_up_is_a_function() -> None:
    assert "schedules.warmup_power" in refusal(ExponentialMovingAverage, use_ema_warmup=True)


@pytest.mark.parametrize("name", ["avg_fn", "multi_avg_fn"])
def test_functions_of_torchs_average_are_told_as_kinds(name: str) -> None:
    message = refusal(ExponentialMovingAverage, **{name: torch.lerp})
    assert "get_ema_avg_fn(decay) is momentum=1 - decay here" in message


def test_what_is_taken_is_listed() -> None:
    listed = refusal(AveragedWeights, nonsense=1).partition("'nonsense'. It takes ")[2].split(", ")
    assert listed[:5] == ["model", "momentum", "arithmetic", "source", "interval"]
    assert {"device", "update_buffers", "every", "distance_every"} < set(listed)
    assert len(set(listed)) == len(listed)
    assert "end_momentum, max_iters" in refusal(CosineEMA, nonsense=1)
    assert refusal(PowerFunctionEMA, nonsense=1).endswith(
        "It takes model, sigma_rel, backend, update_buffers, include, exclude"
    )


def test_a_class_of_ones_own_is_named_with_its_arguments() -> None:
    class Own(BaseAveragedModel):
        def __init__(self, model: Any, speed: float, **options: Any) -> None:
            super().__init__(model, **options)

        def momentum_at(self, steps: int) -> float:
            return 0.5

    message = refusal(Own, speed=1.0, decay=0.9)
    assert message.startswith("Own() got an unexpected keyword argument 'decay': take Exponential")
    assert "It takes model, speed, interval" in message
