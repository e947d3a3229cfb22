"""Our averaged models beside mmengine's own: the same to the bit, but for what is better."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mmengine.model import averaged_model as theirs
from torch import Tensor, nn

from ema_fused.averages import kinds as ours
from ema_fused.engine import backends
from tests.networks import (
    CPU_BACKENDS,
    Cached,
    Tied,
    assert_equal_for,
    conv_net,
    generator,
    train,
)

pytestmark = [
    # What 16-bit averages lose, and who serves them, is not the point here.
    pytest.mark.filterwarnings("ignore:averages are kept in 16 bits"),
    pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "StochasticWeightAverage": {},
    "ExponentialMovingAverage": {"momentum": 0.013},
    "MomentumAnnealingEMA": {"momentum": 0.3, "gamma": 50},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class TheirExpMomentum(theirs.ExponentialMovingAverage):
    """mmdet's average, by its published formula and rounding."""

    def __init__(self, model: nn.Module, gamma: int, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.gamma = gamma

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        m = (1 - self.momentum) * math.exp(-float(1 + steps) / self.gamma) + self.momentum
        averaged_param.mul_(1 - m).add_(source_param, alpha=m)


class TheirCosine(theirs.ExponentialMovingAverage):
    """MMPretrain's average, its message hub replaced by an argument."""

    def __init__(self, model: nn.Module, max_iters: int, end_momentum: float, **rest: Any) -> None:
        super().__init__(model, **rest)
        self.max_iters = max_iters
        self.end_momentum = end_momentum

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        annealed = (math.cos(math.pi * steps / float(self.max_iters)) + 1) / 2
        m = self.end_momentum - (self.end_momentum - self.momentum) * annealed
        averaged_param.mul_(1 - m).add_(source_param, alpha=m)


def skip_where_rounding_is_not_theirs(kind: Any, dtype: torch.dtype) -> None:
    """torch rounds 16-bit add_ by vector position; the native kernel, when pinned, doesn't."""
    if backends.pinned(None) == "cpu" and dtype == torch.bfloat16 and kind.arithmetic != "lerp":
        pytest.skip("EMA_FUSED_BACKEND=cpu pins the kernel that differs in bfloat16's last bit")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_steps_are_equal_to_the_bit(
    kind: str, dtype: torch.dtype, interval: int, update_buffers: bool, backend: str | None
) -> None:
    skip_where_rounding_is_not_theirs(getattr(ours, kind), dtype)
    model = conv_net(dtype=dtype)
    arguments = {"interval": interval, "update_buffers": update_buffers, **KINDS[kind]}
    our = getattr(ours, kind)(model, backend=backend, **arguments)
    their = getattr(theirs, kind)(model, **arguments)
    assert_equal_for(200, model, our, their)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exp_momentum_is_equal_to_the_bit(
    dtype: torch.dtype, interval: int, backend: str | None
) -> None:
    skip_where_rounding_is_not_theirs(ours.ExpMomentumEMA, dtype)
    model = conv_net(dtype=dtype)
    arguments = {"momentum": 0.01, "gamma": 60, "interval": interval, "update_buffers": True}
    our = ours.ExpMomentumEMA(model, **arguments, backend=backend)
    assert_equal_for(200, model, our, TheirExpMomentum(model, **arguments))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosine_is_equal_to_the_bit(dtype: torch.dtype, interval: int, backend: str | None) -> None:
    skip_where_rounding_is_not_theirs(ours.CosineEMA, dtype)
    model = conv_net(dtype=dtype)
    arguments = {"momentum": 0.3, "end_momentum": 0.01, "interval": interval, "max_iters": 200}
    our = ours.CosineEMA(model, **arguments, backend=backend)
    assert_equal_for(200, model, our, TheirCosine(model, **arguments))


def test_the_cosine_phase_has_the_original_rounding() -> None:
    """In float32 most phases round otherwise than in float64: enough to show in the weights."""
    model = nn.Linear(1, 1)
    our = ours.CosineEMA(model, max_iters=777)
    exact = [0.004 * (math.cos(math.pi * step / 777) + 1) / 2 for step in range(777)]
    found = [our.momentum_at(step) for step in range(777)]
    assert found == pytest.approx(exact, abs=1e-9)
    assert sum(a != b for a, b in zip(found, exact, strict=True)) > 500


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_in_channels_last_is_equal_to_the_bit(dtype: torch.dtype) -> None:
    model = conv_net(dtype=dtype).to(memory_format=torch.channels_last)
    our = ours.ExponentialMovingAverage(model, 0.1)
    assert_equal_for(20, model, our, theirs.ExponentialMovingAverage(model, 0.1))


@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_have_the_same_keys_in_the_same_order(kind: str, update_buffers: bool) -> None:
    model = conv_net()
    our = getattr(ours, kind)(model, update_buffers=update_buffers).state_dict()
    their = getattr(theirs, kind)(model, update_buffers=update_buffers).state_dict()
    assert list(our) == list(their)
    assert all(our[name].dtype == their[name].dtype for name in their)


@pytest.mark.parametrize("first, second", [(theirs, ours), (ours, theirs)], ids=["in", "out"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_both_ways(kind: str, interval: int, first: Any, second: Any) -> None:
    model = conv_net()
    saved = getattr(first, kind)(model, interval=interval, **KINDS[kind])
    random = generator()
    for _ in range(50):
        train(model, random)
        saved.update_parameters(model)
    loaded = getattr(second, kind)(conv_net(seed=1), interval=interval, **KINDS[kind])
    loaded.load_state_dict(saved.state_dict(), strict=True)
    assert loaded.steps == 50
    assert_equal_for(50, model, loaded, saved, seed=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_positional_arguments_are_the_same(kind: str) -> None:
    model = conv_net()
    arguments = [0.1, 7, 2, None, True] if kind == "MomentumAnnealingEMA" else [0.1, 2, None, True]
    if kind == "StochasticWeightAverage":
        arguments = [2, None, True]
    our, their = getattr(ours, kind)(model, *arguments), getattr(theirs, kind)(model, *arguments)
    for name in ("momentum", "gamma", "interval", "update_buffers"):
        assert getattr(our, name, None) == getattr(their, name, None)
    assert list(our.avg_parameters) == list(their.avg_parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_are_the_same(kind: str) -> None:
    our, their = getattr(ours, kind)(conv_net()), getattr(theirs, kind)(conv_net())
    for name in ("momentum", "gamma", "interval", "update_buffers"):
        assert getattr(our, name, None) == getattr(their, name, None)


def test_a_subclass_written_for_mmengine_runs_on_ours() -> None:
    def method(self: Any, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        weight = 1 / (self.steps.item() + 2 * float(steps // self.interval))
        averaged_param.mul_(1 - weight).add_(source_param, alpha=weight)

    model = conv_net()
    our = type("Mine", (ours.BaseAveragedModel,), {"avg_func": method})(model, interval=3)
    their = type("Mine", (theirs.BaseAveragedModel,), {"avg_func": method})(model, interval=3)
    assert_equal_for(40, model, our, their)


def test_a_subclass_of_theirs_that_refines_an_average_runs_on_ours() -> None:
    def refined(base: Any) -> Any:
        class Refined(base.ExponentialMovingAverage):  # type: ignore[misc]
            def avg_func(self, averaged: Tensor, source: Tensor, steps: Tensor) -> None:
                super().avg_func(averaged, source.clamp(-0.1, 0.1), steps)

        return Refined

    model = conv_net()
    our, their = refined(ours)(model, momentum=0.2), refined(theirs)(model, momentum=0.2)
    assert_equal_for(20, model, our, their)


# What is different on purpose: first the original's behaviour, then ours.


def test_integer_buffers_are_current_where_theirs_stay_behind() -> None:
    model = conv_net()
    our = ours.ExponentialMovingAverage(model, 0.1, update_buffers=True)
    their = theirs.ExponentialMovingAverage(model, 0.1, update_buffers=True)
    random = generator()
    for _ in range(5):
        train(model, random)
        our.update_parameters(model)
        their.update_parameters(model)
    assert their.module.norm.num_batches_tracked == 1
    assert our.module.norm.num_batches_tracked == model.norm.num_batches_tracked == 5


def test_non_persistent_buffers_follow_where_theirs_stay_behind() -> None:
    model = Cached()
    our = ours.ExponentialMovingAverage(model, 0.1, update_buffers=True)
    their = theirs.ExponentialMovingAverage(model, 0.1, update_buffers=True)
    assert model.cache is not None
    for value in (1.0, 3.0):
        model.cache.fill_(value)
        for averaged in (our, their):
            averaged.update_parameters(model)
    assert their.module.cache.tolist() == [0.0, 0.0]
    assert our.module.cache.tolist() == [3.0, 3.0]


def test_tied_weights_are_averaged_once_where_theirs_are_averaged_twice() -> None:
    model = Tied()
    with torch.no_grad():
        model.encoder.weight.fill_(0.0)
    our = ours.ExponentialMovingAverage(model, 0.25, update_buffers=True)
    their = theirs.ExponentialMovingAverage(model, 0.25, update_buffers=True)
    for averaged in (our, their):
        averaged.update_parameters(model)
    with torch.no_grad():
        model.encoder.weight.fill_(1.0)
    for averaged in (our, their):
        averaged.update_parameters(model)
    assert their.module.encoder.weight.unique().tolist() == [1 - 0.75**2]
    assert our.module.encoder.weight.unique().tolist() == [0.25]


def test_conversions_are_followed_where_theirs_lose_the_updates() -> None:
    model = nn.Linear(2, 2, bias=False)
    our = ours.ExponentialMovingAverage(model, 0.5, update_buffers=True)
    their = theirs.ExponentialMovingAverage(model, 0.5, update_buffers=True)
    for averaged in (our, their):
        averaged.update_parameters(model)
        averaged.double()
    before = our.module.weight.clone()
    model.double()
    with torch.no_grad():
        model.weight.add_(1.0)
    our.update_parameters(model)
    with pytest.raises(RuntimeError, match="dtype"):  # float32 tensors that nobody else holds
        their.update_parameters(model)
    assert torch.equal(their.module.weight, before)
    assert torch.equal(our.module.weight, torch.lerp(before, model.weight, 0.5))


def test_replaced_averaged_parameters_are_followed_where_theirs_lose_the_updates() -> None:
    model = nn.Linear(2, 2)
    our = ours.ExponentialMovingAverage(model, 0.5)
    their = theirs.ExponentialMovingAverage(model, 0.5)
    start = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for averaged in (our, their):
        averaged.update_parameters(model)
        averaged.module.load_state_dict(
            {name: tensor.clone() for name, tensor in start.items()}, assign=True
        )
        averaged.update_parameters(model)
    assert their.module.weight.eq(0).all()
    assert torch.equal(our.module.weight, model.weight / 2)


def test_unexpected_parameters_raise_where_theirs_are_ignored() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    our = ours.ExponentialMovingAverage(model)
    their = theirs.ExponentialMovingAverage(model)
    model.append(nn.Linear(2, 2))
    their.update_parameters(model)
    with pytest.raises(KeyError, match=r"unexpected in the model: 1\.weight, 1\.bias"):
        our.update_parameters(model)


def test_loaded_values_are_kept_where_theirs_are_copied_over() -> None:
    model = nn.Linear(2, 2)
    our, their = (kind.ExponentialMovingAverage(model, 0.5) for kind in (ours, theirs))
    for averaged in (our, their):
        averaged.module.load_state_dict(
            {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        )
    their.update_parameters(model)
    with pytest.warns(UserWarning, match="values were loaded into an average"):
        our.update_parameters(model)
    assert torch.equal(their.module.weight, model.weight)
    assert torch.equal(our.module.weight, model.weight / 2)


def test_copied_buffers_follow_where_theirs_raise_or_are_ignored() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("first", torch.zeros(2))
    our, their = (kind.ExponentialMovingAverage(model, 0.5) for kind in (ours, theirs))
    for averaged in (our, their):
        averaged.update_parameters(model)
    model.register_buffer("later", torch.ones(2))
    for averaged in (our, their):
        averaged.update_parameters(model)
    assert our.module.later.tolist() == [1.0, 1.0]
    assert not hasattr(their.module, "later")
    model.first = torch.arange(3.0)
    our.update_parameters(model)
    assert our.module.first.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(RuntimeError, match="size of tensor"):
        their.update_parameters(model)


def test_buffers_pair_by_name_where_theirs_pair_by_order() -> None:
    class Two(nn.Module):
        def __init__(self, names: list[str]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            for name in names:
                self.register_buffer(name, torch.full((1,), float(ord(name))))

    our, their = (kind.ExponentialMovingAverage(Two(["a", "b"])) for kind in (ours, theirs))
    reordered = Two(["b", "a"])
    our.update_parameters(reordered)
    their.update_parameters(reordered)
    assert their.module.a.item() == ord("b")
    assert our.module.a.item() == ord("a")


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_momentum_out_of_range_is_a_value_error_and_an_assertion_as_theirs(
    momentum: float,
) -> None:
    with pytest.raises(AssertionError):
        theirs.ExponentialMovingAverage(nn.Linear(1, 1), momentum)
    with pytest.raises(AssertionError, match=r"momentum is .*; a number in") as raised:
        ours.ExponentialMovingAverage(nn.Linear(1, 1), momentum)
    assert isinstance(raised.value, ValueError)


def test_the_cosine_stays_at_its_end_where_the_original_comes_back() -> None:
    model = nn.Linear(1, 1, bias=False)
    our, their = ours.CosineEMA(model, max_iters=10), TheirCosine(model, 10, 0.0, momentum=0.004)
    for averaged in (our, their):
        averaged.module.weight.data.zero_()
        averaged.steps.fill_(20)
    with torch.no_grad():
        model.weight.fill_(1.0)
    our.update_parameters(model)
    their.update_parameters(model)
    assert their.module.weight.item() == pytest.approx(0.004)
    assert our.module.weight.item() == pytest.approx(0.0, abs=1e-15)


def test_no_tensor_is_asked_for_its_value_where_theirs_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator each of these waits for everything that is queued there."""
    model = conv_net()
    our = ours.MomentumAnnealingEMA(model, interval=2)
    their = theirs.MomentumAnnealingEMA(model, interval=2)
    our.update_parameters(model)

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was asked for its value")

    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with pytest.raises(AssertionError, match="asked for its value"):
        their.update_parameters(model)
    for _ in range(4):
        our.update_parameters(model)
    monkeypatch.undo()
    assert our.steps == 5
