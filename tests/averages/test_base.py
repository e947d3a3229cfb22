"""What an averaged model does at each call, how it is configured, saved, copied and kept right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import Plan
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.engine.backends import native
from ema_fused.modules.pairing import Pairing
from tests.networks import (
    CPU_BACKENDS,
    Weight,
    conv_net,
    differences,
    generator,
    run,
    snapshot,
    train,
    values_of,
)

KINDS: dict[str, Callable[..., BaseAveragedModel]] = {
    "swa": StochasticWeightAverage,
    "ema": partial(ExponentialMovingAverage, momentum=0.1),
    "annealing": partial(MomentumAnnealingEMA, gamma=5),
    "exponential": partial(ExpMomentumEMA, gamma=5),
    "cosine": partial(CosineEMA, max_iters=50),
}


# What happens at which call.


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_first_call_copies_and_later_ones_average(backend: str | None) -> None:
    averaged = ExponentialMovingAverage(Weight(9.0), 0.5, backend=backend)
    assert values_of(averaged, [4.0, 8.0, 0.0]) == [4.0, 6.0, 3.0]
    assert averaged.steps == 3


def test_between_intervals_parameters_stay_and_steps_grow() -> None:
    averaged = ExponentialMovingAverage(Weight(), 0.5, interval=3)
    sources = [4.0, 100.0, 100.0, 8.0, 100.0, 100.0, 0.0]
    assert values_of(averaged, sources) == [4.0, 4.0, 4.0, 6.0, 6.0, 6.0, 3.0]
    assert averaged.steps == 7


def test_swa_is_the_mean_of_what_it_saw() -> None:
    averaged = StochasticWeightAverage(Weight(), interval=2)
    assert values_of(averaged, [2.0, 50.0, 4.0, 50.0, 9.0]) == [2.0, 2.0, 3.0, 3.0, 5.0]


@pytest.mark.parametrize("interval", [1, 2])
def test_buffers_follow_at_every_call(interval: int) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.1, interval=interval)
    random = generator()
    for _ in range(5):
        train(model, random)
        averaged.update_parameters(model)
        buffers = dict(averaged.module.named_buffers())
        assert differences(buffers, dict(model.named_buffers())) == []
    assert averaged.module.norm.num_batches_tracked == 5


@pytest.mark.parametrize("interval", [1, 2])
def test_update_buffers_averages_floats_and_copies_the_rest(interval: int) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.25, interval=interval, update_buffers=True)
    random = generator()
    expected = None
    for step in range(5):
        train(model, random)
        averaged.update_parameters(model)
        if expected is None:
            expected = model.norm.running_mean.clone()
        elif step % interval == 0:
            expected.lerp_(model.norm.running_mean, 0.25)
        assert torch.equal(averaged.module.norm.running_mean, expected)
        assert averaged.module.norm.num_batches_tracked == model.norm.num_batches_tracked
    assert not torch.equal(expected, model.norm.running_mean)


def test_update_buffers_may_be_switched_while_training() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.25)
    run(averaged, model, 2)
    assert torch.equal(averaged.module.norm.running_var, model.norm.running_var)
    averaged.update_buffers = True
    run(averaged, model, 1, seed=1)
    assert not torch.equal(averaged.module.norm.running_var, model.norm.running_var)


def test_integer_parameters_follow() -> None:
    model = nn.Module()
    model.index = nn.Parameter(torch.arange(3), requires_grad=False)
    averaged = ExponentialMovingAverage(model, 0.5)
    for value in (1, 2, 3):
        model.index.fill_(value)
        averaged.update_parameters(model)
        assert averaged.module.index.tolist() == [value] * 3


@pytest.mark.parametrize("begin", [0, 1, 2, 5])
def test_calls_before_begin_step_copy_and_do_not_count(begin: int) -> None:
    averaged = ExponentialMovingAverage(Weight(), 0.5, begin_step=begin)
    sources = [float(2**k) for k in range(8)]
    first = max(begin, 1) - 1
    expected = sources[: first + 1]
    for source in sources[first + 1 :]:
        expected.append((expected[-1] + source) / 2)
    assert values_of(averaged, sources) == expected
    assert averaged.steps == 8 - first


def test_a_checkpoint_taken_before_begin_step_resumes_the_wait() -> None:
    averaged = ExponentialMovingAverage(Weight(), 0.5, begin_step=5)
    values_of(averaged, [1.0, 2.0])
    resumed = ExponentialMovingAverage(Weight(), 0.5, begin_step=5)
    resumed.load_state_dict(averaged.state_dict())
    assert averaged.steps == resumed.steps == -2
    assert values_of(resumed, [3.0, 4.0, 5.0, 7.0]) == [3.0, 4.0, 5.0, 6.0]


def test_every_update_of_a_network_is_one_operation_of_one_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def count(name: str) -> None:
        real = getattr(Plan, name)

        def counted(plan: Plan, *weight: float, **options: Any) -> None:
            calls.append(name)
            real(plan, *weight, **options)

        monkeypatch.setattr(Plan, name, counted)

    at_once = Pairing.average_at_once

    def counted_at_once(pairing: Pairing, *arguments: Any) -> bool:
        done = at_once(pairing, *arguments)
        if done:
            calls.append("update_model")
        return done

    monkeypatch.setattr(Pairing, "average_at_once", counted_at_once)
    for name in ("lerp_", "copy_", "swap_"):
        count(name)
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.1, interval=2)
    run(averaged, model, 5)
    average = "lerp_" if native() is None else "update_model"
    assert calls == ["copy_", "copy_", average, "copy_", average]


def test_copy_from_sets_the_average_and_leaves_the_count() -> None:
    averaged = ExponentialMovingAverage(Weight(), 0.5)
    values_of(averaged, [1.0, 2.0])
    averaged.copy_from(Weight(8.0))
    assert averaged.steps == 2
    assert values_of(averaged, [4.0]) == [6.0]


def test_forward_calls_the_average() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.1).eval()
    images = torch.rand(2, 1, 6, 6)
    expected = model.eval()(images)
    run(ExponentialMovingAverage(model), model, 3)
    assert torch.equal(averaged(images), expected)
    assert not torch.equal(model(images), expected)


def test_nothing_averaged_requires_a_gradient() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    run(averaged, model, 2)
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_updates_are_not_recorded_by_autograd() -> None:
    model = Weight(3.0)
    averaged = ExponentialMovingAverage(model, 0.5)
    loss = model.weight**2
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    loss.backward()
    assert model.weight.grad == 6.0
    assert averaged.module.weight.grad_fn is None


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_average_made_or_updated_in_inference_mode_is_an_ordinary_one(
    backend: str | None,
) -> None:
    model, twin = conv_net(), conv_net()
    expected = ExponentialMovingAverage(twin, 0.5, backend=backend)
    with torch.inference_mode():
        averaged = ExponentialMovingAverage(model, 0.5, backend=backend)
        run(averaged, model, 2)
    run(expected, twin, 2)
    for average, net in ((averaged, model), (expected, twin)):
        run(average, net, 2, seed=1)
    assert differences(snapshot(averaged), snapshot(expected)) == []


# Dtypes.


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_average_of_a_bfloat16_model_is_that_of_its_exact_values(
    kind: str, backend: str | None
) -> None:
    model, widened = conv_net(dtype=torch.bfloat16), conv_net(dtype=torch.bfloat16)
    averaged = KINDS[kind](
        model, averaged_dtype=torch.float32, update_buffers=True, backend=backend
    )
    expected = KINDS[kind](widened.float(), update_buffers=True, backend=backend)
    random = generator()
    for _ in range(20):
        train(model, random)
        widened.load_state_dict(model.state_dict())
        averaged.update_parameters(model)
        expected.update_parameters(widened)
    assert {tensor.dtype for tensor in averaged.module.state_dict().values()} == {
        torch.float32,
        torch.int64,
    }
    assert differences(snapshot(averaged), snapshot(expected)) == []


@pytest.mark.parametrize("dtype", ["float32", torch.int32])
def test_an_averaged_dtype_that_is_none_is_refused(dtype: Any) -> None:
    with pytest.raises(
        ValueError, match=r"averaged_dtype is .*; a floating-point dtype is expected"
    ):
        ExponentialMovingAverage(nn.Linear(2, 2), averaged_dtype=dtype)


def test_averaged_dtype_converts_floating_buffers_and_nothing_else() -> None:
    model = conv_net(dtype=torch.bfloat16)
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    averaged = ExponentialMovingAverage(model, averaged_dtype=torch.float64)
    assert averaged.module.norm.running_mean.dtype == torch.float64
    assert averaged.module.norm.num_batches_tracked.dtype == torch.int64
    assert averaged.module.mask.dtype == torch.bool
    assert {p.dtype for p in averaged.module.parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# The step count.


def write_in_place(averaged: BaseAveragedModel) -> None:
    averaged.steps.fill_(5)


def write_through_a_kept_tensor(averaged: BaseAveragedModel) -> None:
    dict(averaged.named_buffers())["steps"].fill_(5)


def assign(averaged: BaseAveragedModel) -> None:
    """Another tensor, as often written as the one that it replaces."""
    steps = torch.tensor(5)
    while steps._version < averaged.steps._version:
        steps.fill_(5)
    averaged.steps = steps


def load(averaged: BaseAveragedModel) -> None:
    averaged.load_state_dict(averaged.state_dict() | {"steps": torch.tensor(5)})


def load_assigning(averaged: BaseAveragedModel) -> None:
    averaged.load_state_dict(averaged.state_dict() | {"steps": torch.tensor(5)}, assign=True)


@pytest.mark.parametrize(
    "write", [write_in_place, write_through_a_kept_tensor, assign, load, load_assigning]
)
def test_whoever_writes_the_step_count_is_followed(
    write: Callable[[BaseAveragedModel], None],
) -> None:
    averaged = StochasticWeightAverage(Weight())
    values_of(averaged, [0.0, 0.0])
    write(averaged)
    assert values_of(averaged, [6.0]) == [1.0]
    assert averaged.steps == 6
    write(averaged)
    assert averaged.steps == 5


def test_the_step_count_can_be_read_in_every_way_at_every_time() -> None:
    """A parent module's named_buffers() too: DistributedDataParallel broadcasts what it finds."""
    averaged = ExponentialMovingAverage(Weight())
    parent = nn.ModuleDict({"teacher": averaged})
    kept = averaged.steps
    for count in range(1, 4):
        averaged.update_parameters(Weight())
        assert averaged.steps is kept
        assert kept == count
        assert dict(parent.named_buffers())["teacher.steps"] == count
        assert parent.state_dict()["teacher.steps"] == count
        assert copy.deepcopy(averaged).steps == count


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_copy_reads_the_step_count_that_was_just_written(before: int) -> None:
    averaged = ExponentialMovingAverage(Weight())
    run(averaged, Weight(), before)
    averaged.steps.fill_(9)
    for copied in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))):
        copied.update_parameters(Weight())
        assert copied.steps == 10


# Saving and copying.


def by_pickle(averaged: BaseAveragedModel) -> BaseAveragedModel:
    return pickle.loads(pickle.dumps(averaged))


def by_torch_save(averaged: BaseAveragedModel) -> BaseAveragedModel:
    file = io.BytesIO()
    torch.save(averaged, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(averaged: BaseAveragedModel) -> BaseAveragedModel:
    file = io.BytesIO()
    torch.save(averaged.state_dict(), file)
    file.seek(0)
    arguments = {name: getattr(averaged, name) for name in ("interval", "update_buffers")}
    kind = type(averaged)
    extra = {"gamma": 5} if hasattr(averaged, "gamma") else {}
    extra |= {"max_iters": 50} if kind is CosineEMA else {}
    extra |= {"momentum": averaged.momentum} if hasattr(averaged, "momentum") else {}
    fresh = kind(conv_net(seed=7), **arguments, **extra)
    fresh.load_state_dict(torch.load(file), strict=True)
    return fresh


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle, by_torch_save, by_state_dict])
def test_a_saved_average_continues_to_the_bit(
    way: Callable[[BaseAveragedModel], BaseAveragedModel], kind: str, interval: int
) -> None:
    model = conv_net()
    averaged = KINDS[kind](model, interval=interval, update_buffers=True)
    run(averaged, model, 8)
    resumed = way(averaged)
    assert differences(snapshot(resumed), snapshot(averaged)) == []
    twin = copy.deepcopy(model)
    run(averaged, model, 8, seed=1)
    run(resumed, twin, 8, seed=1)
    assert differences(snapshot(resumed), snapshot(averaged)) == []
    assert resumed.steps == 16


def test_a_copy_of_an_average_does_not_hold_the_model() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model)
    averaged.update_parameters(model)
    copied = copy.deepcopy(averaged)
    run(copied, model, 2)
    assert averaged.steps == 1
    alone = len(pickle.dumps(ExponentialMovingAverage(model)))
    assert len(pickle.dumps(averaged)) == pytest.approx(alone, rel=0.02)


def test_a_teacher_inside_its_model_is_saved_and_copied_with_it() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = conv_net()
            self.teacher = ExponentialMovingAverage(self.student, 0.1)

    model = Student()
    run(model.teacher, model.student, 3)
    copied = copy.deepcopy(model)
    for whole in (model, copied):
        run(whole.teacher, whole.student, 3, seed=1)
    assert differences(snapshot(model), snapshot(copied)) == []
    assert not any("teacher.student" in name for name in model.state_dict())
