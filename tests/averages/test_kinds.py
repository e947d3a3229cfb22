"""How averages are computed: momentum, schedules, subclasses."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_fused.averages import schedules
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
)
from tests.networks import Tied, Weight, conv_net, differences, run, snapshot, values_of

# Subclasses.


class Halves(BaseAveragedModel):
    def momentum_at(self, steps: int) -> float:
        return 0.5


class OneByOne(BaseAveragedModel):
    """As mmengine's subclasses are written."""

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        assert not averaged_param.requires_grad and not source_param.requires_grad
        assert averaged_param.dtype == source_param.dtype
        assert steps is self._buffers["steps"]
        averaged_param.mul_(0.25).add_(source_param, alpha=0.75 / float(steps))


def test_a_subclass_may_give_its_momentum() -> None:
    assert values_of(Halves(Weight()), [2.0, 4.0]) == [2.0, 3.0]


def test_a_subclass_may_average_tensor_by_tensor() -> None:
    averaged = OneByOne(Weight())
    assert values_of(averaged, [4.0, 8.0, 8.0]) == [4.0, 7.0, 0.25 * 7 + 3]


def test_tensor_by_tensor_floats_are_averaged_and_the_rest_follows() -> None:
    model = conv_net()
    averaged = OneByOne(model, update_buffers=True, interval=2)
    run(averaged, model, 3)
    assert averaged.module.norm.num_batches_tracked == 3
    assert not torch.equal(averaged.module.norm.running_mean, model.norm.running_mean)
    run(averaged, model, 1)
    assert averaged.module.norm.num_batches_tracked == 4


def test_tensor_by_tensor_the_source_comes_in_the_averages_dtype() -> None:
    averaged = OneByOne(Weight().bfloat16(), averaged_dtype=torch.float32)
    model = Weight().bfloat16()
    averaged.update_parameters(model.set_to(1.0))
    averaged.update_parameters(model.set_to(3.0))
    assert averaged.module.weight.item() == 0.25 + 0.75 * 3.0


def test_tensor_by_tensor_tied_weights_are_averaged_once() -> None:
    calls = []

    class Counting(OneByOne):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
            calls.append(averaged_param.shape)

    model = Tied()
    averaged = Counting(model)
    run(averaged, model, 2)
    assert calls == [(4, 4)]


def test_the_way_defined_nearer_to_the_class_counts() -> None:
    class FromMomentum(Halves):
        avg_func = OneByOne.avg_func

    class FromTensors(OneByOne):
        momentum_at = Halves.momentum_at

    class Inheriting(FromTensors):
        pass

    assert values_of(FromMomentum(Weight()), [4.0, 8.0]) == [4.0, 7.0]
    assert values_of(FromTensors(Weight()), [4.0, 8.0]) == [4.0, 6.0]
    assert values_of(Inheriting(Weight()), [4.0, 8.0]) == [4.0, 6.0]


def test_a_refined_avg_func_may_call_the_one_it_refines() -> None:
    class Clamped(ExponentialMovingAverage):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
            super().avg_func(averaged_param, source_param.clamp(max=1.0), steps)

    assert values_of(Clamped(Weight(), 0.5), [0.0, 8.0]) == [0.0, 0.5]


def test_a_class_that_does_not_say_how_to_average_is_refused() -> None:
    class Empty(BaseAveragedModel):
        pass

    for cls in (Empty, BaseAveragedModel):
        with pytest.raises(TypeError, match=f"{cls.__name__} doesn't say how to average"):
            cls(Weight())


# Momentum.


def test_momentum_may_be_a_function_of_the_step() -> None:
    schedule = partial(schedules.linear_warmup, momentum=0.5, warm_up=4)
    averaged = ExponentialMovingAverage(Weight(), schedule)
    expected = [0.0]
    for step in range(1, 6):
        weight = schedule(step)
        expected.append((1 - weight) * expected[-1] + weight * step)
    assert values_of(averaged, [float(k) for k in range(6)]) == pytest.approx(expected)


@pytest.mark.parametrize("momentum", [1.01, -0.01, math.nan, math.inf])
def test_a_schedule_that_leaves_its_range_is_refused_and_nothing_changes(momentum: float) -> None:
    averaged = ExponentialMovingAverage(conv_net(), lambda step: momentum if step == 2 else 0.5)
    model = conv_net()
    run(averaged, model, 2)
    before = snapshot(averaged)
    with pytest.raises(ValueError, match=r"ExponentialMovingAverage has momentum .* at step 2"):
        run(averaged, model, 1)
    assert differences(snapshot(averaged), before) == []


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_schedule_may_stand_still_or_copy(momentum: float) -> None:
    averaged = ExponentialMovingAverage(Weight(), lambda step: momentum)
    assert values_of(averaged, [1.0, 2.0]) == [1.0, 1.0 + momentum]


def test_momentum_may_be_changed_while_training() -> None:
    averaged = ExponentialMovingAverage(Weight(), 0.25)
    values_of(averaged, [0.0, 4.0])
    averaged.momentum = 0.5
    assert values_of(averaged, [4.0]) == [2.5]


def test_a_large_momentum_is_taken_for_a_mistake() -> None:
    with pytest.warns(UserWarning, match=r"would be momentum=0\.001$"):
        ExponentialMovingAverage(Weight(), 0.999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExponentialMovingAverage(Weight(), 0.5)
        ExponentialMovingAverage(Weight(), lambda step: 0.999)


def test_cosine_needs_to_know_how_long_training_is() -> None:
    with pytest.raises(RuntimeError, match=r"max_iters=\.\.\., or override total_steps"):
        CosineEMA(Weight(), 0.5)

    class Known(CosineEMA):
        def total_steps(self) -> int:
            return 4

    class Asking(CosineEMA):
        """Knows it later: as where a runner is asked."""

        def total_steps(self) -> int:
            return super().total_steps()

    averaged = Asking(Weight(), 0.5)
    averaged.update_parameters(Weight())
    with pytest.raises(RuntimeError, match=r"max_iters=\.\.\., or override total_steps"):
        averaged.update_parameters(Weight())
    values = values_of(Known(Weight(), 0.5), [0.0, 1.0, 1.0, 1.0, 9.0])
    weights = [schedules.cosine(step, start=0.5, total=4) for step in range(5)]
    expected = [0.0]
    for weight, source in zip(weights[1:], [1.0, 1.0, 1.0, 9.0], strict=True):
        expected.append((1 - weight) * expected[-1] + weight * source)
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ExponentialMovingAverage, "interval", 0),
        (ExponentialMovingAverage, "interval", 1.5),
        (ExponentialMovingAverage, "interval", True),
        (ExponentialMovingAverage, "begin_step", -1),
        (ExponentialMovingAverage, "momentum", "0.1"),
        (ExponentialMovingAverage, "momentum", None),
        (ExponentialMovingAverage, "averaged_dtype", torch.int8),
        (MomentumAnnealingEMA, "gamma", 0),
        (MomentumAnnealingEMA, "momentum", math.sqrt),
        (ExpMomentumEMA, "gamma", -3),
        (CosineEMA, "end_momentum", 1.5),
        (CosineEMA, "max_iters", 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_wrong_arguments_are_named(kind: Any, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        kind(Weight(), **{name: value})
    assert str(raised.value).startswith(f"{name} is {value}" if name != "momentum" else name)
    assert "expected" in str(raised.value)


def test_an_unknown_backend_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="backend 'gpu' is none of cuda, cpu, foreach"):
        ExponentialMovingAverage(Weight(), backend="gpu")


# What 16 bits lose.


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"]
)
def test_one_warning_where_16_bits_lose_updates(dtype: torch.dtype, limit: float) -> None:
    model = conv_net(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ExponentialMovingAverage(model, limit), model, 3)
        run(ExponentialMovingAverage(model, limit / 2, averaged_dtype=torch.float32), model, 3)
        run(ExponentialMovingAverage(model, lambda step: 0.0), model, 3)
        run(ExponentialMovingAverage(conv_net(), limit / 2), model.float(), 3)
    model.to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        averaged = ExponentialMovingAverage(model, limit / 2)
        for _ in range(5):
            averaged.update_parameters(model)
    (warning,) = caught
    assert "averaged_dtype=torch.float32" in str(warning.message)
    assert warning.filename == __file__


def test_what_the_warning_warns_of() -> None:
    averaged = ExponentialMovingAverage(Weight().bfloat16(), 0.001)
    model = Weight().bfloat16()
    averaged.update_parameters(model.set_to(1.0))
    with pytest.warns(UserWarning, match="averages are kept in 16 bits"):
        for _ in range(100):
            averaged.update_parameters(model.set_to(2.0))
    assert averaged.module.weight == 1.0
