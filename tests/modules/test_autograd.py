"""Autograd refuses to go back through values that were overwritten, as it does with torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ema_fused
from ema_fused import AveragedWeights, Plan
from ema_fused.adapters import swa_utils
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.hooks.momentum_update import momentum_update
from tests.networks import CPU_BACKENDS, ConvNet, conv_net, generator, run, train

KINDS: dict[str, Callable[[nn.Module], BaseAveragedModel]] = {
    "mean": StochasticWeightAverage,
    "exponential": ExponentialMovingAverage,
    "annealing": MomentumAnnealingEMA,
    "exp-momentum": ExpMomentumEMA,
    "cosine": lambda model: CosineEMA(model, max_iters=100),
}
REFUSED = r"modified by an inplace operation"
RANDOM = generator()


def images() -> Tensor:
    return torch.rand(2, 1, 6, 6, requires_grad=True)


def loss_of(module: nn.Module) -> Tensor:
    """A loss whose gradient needs the module's weights."""
    loss: Tensor = module(images()).square().sum()
    return loss


def versions(module: nn.Module) -> list[int]:
    return [tensor._version for tensor in [*module.parameters(), *module.buffers()]]


def hidden_versions(averaged: BaseAveragedModel) -> list[int]:
    """The same of an average, without looking into it as a user does."""
    module = averaged._modules["module"]
    assert module is not None
    return versions(module)


def trained(kind: str = "exponential", **options: Any) -> tuple[nn.Module, BaseAveragedModel]:
    model = conv_net().eval()
    averaged = KINDS[kind](model, **options)
    run(averaged, model, 3)
    return model, averaged.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_going_back_through_an_average_that_was_updated_is_refused(kind: str) -> None:
    model, averaged = trained(kind)
    for _ in range(3):
        loss = loss_of(averaged)
        averaged.update_parameters(model)
        with pytest.raises(RuntimeError, match=REFUSED):
            loss.backward()
    loss_of(averaged).backward()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_buffers": True},
        {"interval": 2},
        {"every": 2},
        {"averaged_dtype": torch.float64},
        {"rounding": "stochastic"},
        {"capturable": True},
        {"distance_every": 1},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_it_is_refused_on_every_way_of_an_update(
    options: dict[str, Any], backend: str | None
) -> None:
    model = conv_net().eval()
    averaged = ExponentialMovingAverage(model, 0.25, backend=backend, **options).eval()
    averaged.update_parameters(model)
    teacher = averaged.module
    dtype = options.get("averaged_dtype", torch.float32)
    for _ in range(4):
        train(model, RANDOM)
        before = [parameter.detach().clone() for parameter in teacher.parameters()]
        loss = teacher(images().to(dtype)).square().sum()
        averaged.update_parameters(model)
        if all(map(torch.equal, before, teacher.parameters())):
            continue  # this call leaves the parameters alone; buffers may be copied
        with pytest.raises(RuntimeError, match=REFUSED):
            loss.backward()


def test_the_averages_own_averaging_function_counts_too() -> None:
    class Own(BaseAveragedModel):
        def avg_func(self, averaged: Tensor, source: Tensor, steps: Tensor) -> None:
            averaged.lerp_(source, 0.5)

    model = conv_net().eval()
    averaged = Own(model).eval()
    averaged.update_parameters(model)
    loss = loss_of(averaged)
    averaged.update_parameters(model)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()


@pytest.mark.parametrize(
    "look",
    [
        lambda averaged: averaged.module,
        lambda averaged: averaged(images()),
        lambda averaged: list(averaged.parameters()),
        lambda averaged: list(averaged.buffers()),
        lambda averaged: list(averaged.children()),
        lambda averaged: list(averaged.modules()),
        lambda averaged: list(nn.ModuleList([averaged]).modules()),
        lambda averaged: averaged.get_parameter("module.head.weight"),
        lambda averaged: averaged.state_dict(),
        lambda averaged: averaged.avg_parameters,
        lambda averaged: averaged.apply(lambda module: None),
    ],
    ids=[
        "module",
        "call",
        "parameters",
        "buffers",
        "children",
        "modules",
        "modules-of-what-holds-it",
        "get_parameter",
        "state_dict",
        "avg_parameters",
        "apply",
    ],
)
def test_versions_count_from_the_first_look_into_the_average(
    look: Callable[[BaseAveragedModel], Any],
) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.25)
    for _ in range(3):
        averaged.update_parameters(model)
    before = hidden_versions(averaged)
    averaged.update_parameters(model)
    assert hidden_versions(averaged) == before  # nobody can have it in a graph
    seen = look(averaged)
    averaged.update_parameters(model)
    assert all(now > then for now, then in zip(hidden_versions(averaged), before, strict=True))
    del seen


def test_a_swap_isnt_a_look_into_the_average_and_counts_itself() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.25)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    with averaged.swapped(model):
        pass
    averaged.copy_to(model)
    before = hidden_versions(averaged)
    averaged.update_parameters(model)
    assert hidden_versions(averaged) == before


@pytest.mark.parametrize("counts", [False, True])
def test_the_option_decides_for_every_kind(counts: bool) -> None:
    for kind in (ExponentialMovingAverage, AveragedWeights):
        model = conv_net()
        averaged = kind(model, 0.25, version_counters=counts)
        for _ in range(2):
            averaged.update_parameters(model)
        before = versions(averaged.module)
        averaged.update_parameters(model)
        assert (versions(averaged.module) != before) is counts


def test_averaged_weights_can_be_in_a_graph_by_the_option_alone() -> None:
    model = conv_net().eval()
    for options, counts in (({}, False), ({"version_counters": True}, True)):
        averaged = AveragedWeights(model, 0.25, **options)
        averaged.update_parameters(model)
        output = torch.func.functional_call(model, averaged.weights, (images(),))
        averaged.update_parameters(model)
        if counts:
            with pytest.raises(RuntimeError, match=REFUSED):
                output.square().sum().backward()
        else:
            output.square().sum().backward()


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(TypeError, match="version_counters is 'yes'; True, False or None"):
        ExponentialMovingAverage(conv_net(), version_counters="yes")


def _swapped(model: nn.Module, averaged: BaseAveragedModel) -> None:
    with averaged.swapped(model):
        pass


def _out_again(model: nn.Module, averaged: BaseAveragedModel) -> None:
    exchange = averaged.exchange_with(model, averages_alone=True)
    exchange.put_in()
    exchange.take_out()


WRITES: dict[str, Callable[[nn.Module, BaseAveragedModel], None]] = {
    "copy_to": lambda model, averaged: averaged.copy_to(model),
    "swapped": _swapped,
    "exchange": _out_again,
    "put_in": lambda model, averaged: averaged.exchange_with(model).put_in(),
}


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["swapped", "overwritten"])
@pytest.mark.parametrize("write", WRITES)
def test_going_back_through_a_model_that_was_written_is_refused(
    write: str, dtype: torch.dtype | None
) -> None:
    model, averaged = trained(averaged_dtype=dtype)
    loss = loss_of(model)
    WRITES[write](model, averaged)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()


def test_a_loss_from_inside_the_block_is_refused_after_it() -> None:
    model, averaged = trained()
    with averaged.swapped(model):
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    loss_of(model).backward()


def test_inside_the_block_a_loss_goes_back_to_the_averages() -> None:
    model, averaged = trained()
    inputs = images()
    averaged(inputs).square().sum().backward()
    expected = inputs.grad
    inputs.grad = None
    with averaged.swapped(model):
        model(inputs).square().sum().backward()
    assert expected is not None and inputs.grad is not None
    assert torch.equal(inputs.grad, expected)


@pytest.mark.parametrize("write", WRITES)
def test_autocast_casts_what_the_model_holds_now(write: str) -> None:
    model, averaged = trained()
    inputs = images()
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(2.0)
    with torch.autocast("cpu", torch.bfloat16):
        raw = model(inputs).detach()
        WRITES[write](model, averaged)
        now = model(inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(now, model(inputs))
    is_out_again = write in ("swapped", "exchange")
    assert torch.equal(now, raw) is is_out_again


def test_autocast_follows_into_the_block_and_out_of_it() -> None:
    model, averaged = trained()
    inputs = images()
    with torch.autocast("cpu", torch.bfloat16):
        average = averaged(inputs)
        raw = model(inputs)
        with averaged.swapped(model):
            inside = model(inputs)
        after = model(inputs)
    assert not torch.equal(raw, average)
    assert torch.equal(inside, average)
    assert torch.equal(after, raw)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_plan_counts_if_it_is_told_to(backend: str | None) -> None:
    for counts in (False, True):
        averaged = [torch.zeros(3), torch.zeros(2, 5)]
        source = [torch.ones(3), torch.ones(2, 5)]
        plan = Plan(averaged, source, version_counters=counts, backend=backend)
        flag = torch.zeros(1)
        calls: list[Callable[[], None]] = [
            lambda plan=plan: plan.lerp_(0.5),
            lambda plan=plan, flag=flag: plan.lerp_(0.5, found_inf=flag),
            plan.copy_,
            plan.swap_,
        ]
        is_native = plan.backends != ("foreach",)
        for call in calls:
            before = [tensor._version for tensor in averaged]
            sources_before = [tensor._version for tensor in source]
            call()
            after = [tensor._version for tensor in averaged]
            if counts or is_native:
                assert (after != before) is counts
                assert all(now > then for now, then in zip(after, before, strict=True)) is counts
            sources_moved = [tensor._version for tensor in source] != sources_before
            if is_native:
                assert sources_moved is (counts and call == plan.swap_)
        again = copy.deepcopy(plan)
        before = [tensor._version for tensor in again.averaged]
        again.copy_()
        if is_native:
            assert ([tensor._version for tensor in again.averaged] != before) is counts


def test_functions_on_lists_count_as_torchs_do() -> None:
    averaged = [torch.zeros(3), torch.zeros(2, 5)]
    source = [torch.ones(3), torch.ones(2, 5)]
    inputs = torch.rand(2, 5, requires_grad=True)
    for call in (
        lambda: ema_fused.lerp_(averaged, source, 0.5),
        lambda: ema_fused.copy_(tuple(averaged), source),
        lambda: ema_fused.swap_(averaged, source),
    ):
        for _ in range(2):  # planned, then found in the cache
            product = (inputs * averaged[1]).sum()
            call()
            with pytest.raises(RuntimeError, match=REFUSED):
                product.backward()
    product = (inputs * source[1]).sum()
    ema_fused.swap_(averaged, source)
    with pytest.raises(RuntimeError, match=REFUSED):
        product.backward()


def test_lists_with_inference_tensors_are_averaged() -> None:
    with torch.inference_mode():
        averaged = [torch.zeros(3)]
    averaged.append(torch.zeros(2))
    ema_fused.lerp_(averaged, [torch.ones(3), torch.ones(2)], 0.5)
    assert [tensor[0].item() for tensor in averaged] == [0.5, 0.5]
    assert averaged[1]._version == 1


def test_a_target_network_counts() -> None:
    target, online = ConvNet().eval(), ConvNet().eval()
    momentum_update(target, online, 0.9)
    for _ in range(2):
        loss = loss_of(target)
        momentum_update(target, online, 0.9)
        with pytest.raises(RuntimeError, match=REFUSED):
            loss.backward()


@pytest.mark.parametrize("multi", [False, True], ids=["mean", "multi_avg_fn"])
def test_torchs_averaged_model_counts(multi: bool) -> None:
    function = swa_utils.get_ema_multi_avg_fn(0.9) if multi else None
    for cls in (swa_utils.AveragedModel, torch.optim.swa_utils.AveragedModel):
        model = conv_net().eval()
        averaged = cls(model, multi_avg_fn=function).eval()
        averaged.update_parameters(model)
        train(model, RANDOM)
        loss = loss_of(averaged)
        averaged.update_parameters(model)
        with pytest.raises(RuntimeError, match=REFUSED):
            loss.backward()
