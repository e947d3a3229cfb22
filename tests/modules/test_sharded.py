"""Averages of models that are spread over processes, beside those of one process, to the bit."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import swa_utils

import ema_fused
from ema_fused import AveragedWeights, ExponentialMovingAverage, attach
from ema_fused.averages import schedules
from ema_fused.engine.dtensors import is_sharded, local
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.exchanging import exchange_of_everything
from tests.modules.sharded_beside import Beside, differing, state_of
from tests.ranks import Ranks
from tests.sharded_models import (
    MIXED,
    WAYS,
    perceptron,
    spread,
    train,
    trainer,
    whole,
    whole_weights,
)

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffers": {"update_buffers": True},
    "double": {"averaged_dtype": torch.float64},
    "interval": {"interval": 2},
    "every": {"every": 2},
    "schedule": {"momentum": partial(schedules.annealing, momentum=0.05, gamma=3)},
    "by name": {"momentum": {"^first": 0.5, r"\.bias$": 0.25, "": 0.05}},
    "mean": {"momentum": schedules.mean, "arithmetic": "delta"},
}


def averages_in(way: str) -> dict[str, list[str]]:
    found = {}
    for name, options in OPTIONS.items():
        if way == "fsdp1" and name == "double":
            continue  # refused: test_fsdp1_refuses_to_round_its_averages
        beside = Beside(way, **options)
        found[name] = []
        for number in range(STEPS):
            beside.step(number)
            found[name] += [f"{number}: {one}" for one in beside.differing()]
        assert beside.averaged.steps == STEPS
    return found


@pytest.mark.parametrize("way", WAYS)
def test_shards_average_to_the_bits_of_the_whole(two_ranks: Ranks, way: str) -> None:
    for found in two_ranks.run(averages_in, way):
        assert found and not any(found.values()), found


@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_four_processes_some_without_a_row(four_ranks: Ranks, way: str) -> None:
    for found in four_ranks.run(averages_in, way):
        assert found and not any(found.values()), found


def elements_held() -> list[int]:
    return [AveragedWeights(spread(perceptron(), "fsdp2")).weights["scale"].to_local().numel()]


def test_a_process_without_a_row_holds_nothing(four_ranks: Ranks) -> None:
    assert four_ranks.run(elements_held) == [[1], [0], [0], [0]]


def averages_of_16_bits() -> list[str]:
    beside = Beside("fsdp2", dtype=torch.bfloat16, averaged_dtype=torch.float32)
    for number in range(STEPS):
        beside.step(number)
    dtypes = {tensor.dtype for tensor in beside.averaged.weights.values()}
    assert dtypes == {torch.float32, torch.int64}, dtypes
    return beside.differing()


def test_a_float32_average_of_bfloat16_shards(two_ranks: Ranks) -> None:
    assert two_ranks.run(averages_of_16_bits) == [[], []]


def averages_of_mixed_precision(way: str) -> list[str]:
    """The passes compute in bfloat16; shards, and what is swapped in, have float32's bits."""
    beside = Beside(way)
    averaged, model, inputs = beside.averaged, beside.model, torch.ones(2, 7)
    problems, computed = [], set()
    model.get_submodule("last").register_forward_hook(lambda *seen: computed.add(seen[-1].dtype))
    for number in range(STEPS):
        beside.step(number)
        model.eval()
        with torch.no_grad():
            own = model(inputs).clone()  # gathers in bfloat16, and the update drops that
        before = whole_weights(model)
        with averaged.swapped(model), torch.no_grad():
            evaluated = model(inputs).clone()
        exchange = averaged.exchange_with(model)
        exchange.put_in()
        problems += differing(whole_weights(model), dict(beside.reference.module.state_dict()))
        exchange.take_out()
        problems += differing(whole_weights(model), before) + beside.differing()
        with torch.no_grad():
            problems += [] if torch.equal(model(inputs), own) else ["another output"]
        problems += [] if number == 0 or not torch.equal(evaluated, own) else ["nothing swapped"]
    rounded = {name: one.bfloat16().float() for name, one in state_of(averaged, model).items()}
    assert "module.first.weight" in differing(rounded, state_of(averaged, model))
    assert computed == {torch.bfloat16}
    return problems


@pytest.mark.parametrize("way", MIXED)
def test_of_mixed_precision_the_float32_shards_are_averaged(two_ranks: Ranks, way: str) -> None:
    assert two_ranks.run(averages_of_mixed_precision, way) == [[], []]


def two_kinds_of_parallelism() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5))
    parallelize_module(model[0], mesh["tensor"], ColwiseParallel())
    # Rows of a column that others hold the rest of: sharded twice.
    fully_shard(model[0], mesh=mesh["data"])
    averaged = AveragedWeights(model, 0.25)
    expected = {name: whole(tensor) for name, tensor in averaged.weights.items()}
    for number in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                local(parameter).add_(number)
        averaged.update_parameters(model)
        weights = {name: whole(tensor) for name, tensor in model.named_parameters()}
        if number == 1:
            expected = weights
        else:
            for name, tensor in expected.items():
                tensor.lerp_(weights[name], 0.25)
    return differing({name: whole(tensor) for name, tensor in averaged.weights.items()}, expected)


def test_parameters_sharded_twice(four_ranks: Ranks) -> None:
    assert four_ranks.run(two_kinds_of_parallelism) == [[]] * 4


def evaluations_in(way: str) -> tuple[float, float, list[str]]:
    beside = Beside(way)
    averaged, model = beside.averaged, beside.model
    inputs = torch.linspace(-1, 1, 14).reshape(2, 7)
    apart = back = 0.0
    changed: list[str] = []
    plain = perceptron().eval()
    exchange = exchange_of_everything(  # made once, as hooks do
        averaged.module, model, shares=FrozenShares(), backend=None
    )
    for number in range(3):
        beside.step(number)
        before = whole_weights(model)
        model.eval()
        with torch.no_grad():
            own = model(inputs).clone()
            # The forward pass has gathered what FSDP keeps until the backward pass.
            with averaged.swapped(model) as evaluated:
                found = evaluated(inputs)
            back = max(back, float((model(inputs) - own).abs().max()))
            beside.reference.copy_to(plain)
            apart = max(apart, float((found - plain(inputs)).abs().max()))
            exchange.put_in()
            apart = max(apart, float((model(inputs) - plain(inputs)).abs().max()))
            exchange.take_out()
            back = max(back, float((model(inputs) - own).abs().max()))
        changed += differing(before, whole_weights(model)) + beside.differing()
    return apart, back, changed


@pytest.mark.parametrize("way", WAYS)
def test_averages_swapped_into_a_spread_model(two_ranks: Ranks, way: str) -> None:
    for apart, back, changed in two_ranks.run(evaluations_in, way):
        assert apart < (1e-6 if way == "tensor_parallel" else 1e-30)  # sums in another order
        assert back == 0.0
        assert changed == []


def updates_of_gathered(way: str) -> list[str]:
    beside = Beside(way)
    beside.step(0)
    beside.model.eval()
    for _ in range(2):
        with torch.no_grad():
            beside.model(torch.ones(2, 7))
        beside.averaged.update_parameters(beside.model)
        beside.reference.update_parameters(beside.plain)
    return beside.differing()


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_has_gathered_its_parameters(two_ranks: Ranks, way: str) -> None:
    assert two_ranks.run(updates_of_gathered, way) == [[], []]


def made_of_gathered() -> list[str]:
    """As after an evaluation before the training: the root has gathered its parameters."""
    model = fully_shard(perceptron(), mesh=init_device_mesh("cpu", (2,)))
    with torch.no_grad():
        model.eval()(torch.ones(2, 7))
    averaged = AveragedWeights(model, 0.5)
    whole_ones = [name for name, one in averaged.module.named_parameters() if not is_sharded(one)]
    with torch.no_grad():
        model(torch.ones(2, 7))
    optimizer = trainer(fully_shard(perceptron(), mesh=init_device_mesh("cpu", (2,))))
    optimizer.param_groups[0]["params"] = [one for _, one in sharded_parameters(model)]
    with torch.no_grad():
        model(torch.ones(2, 7))
    with attach(optimizer, model, averaged):
        pass
    averaged.update_parameters(model)
    return whole_ones


def sharded_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    model.reshard()
    return list(model.named_parameters())


def test_an_average_made_of_gathered_parameters(two_ranks: Ranks) -> None:
    assert two_ranks.run(made_of_gathered) == [[], []]


def written_into(way: str) -> list[str]:
    beside = Beside(way)
    for number in range(2):
        beside.step(number)
        beside.model.eval()
        with torch.no_grad():
            beside.model(torch.ones(2, 7))  # gathers
    beside.averaged.copy_to(beside.model)
    beside.reference.copy_to(beside.plain)
    model_is = differing(whole_weights(beside.model), dict(beside.plain.state_dict()))
    with torch.no_grad():
        beside.model.eval()
        beside.plain.eval()
        inputs = torch.ones(2, 7)
        assert torch.allclose(beside.model(inputs), beside.plain(inputs), atol=1e-6)
    return model_is


def going_back_through_written(write: str) -> str:
    spread_over = Beside("tensor_parallel")
    spread_over.step(0)
    loss = spread_over.model(torch.ones(4, 7)).square().sum()
    if write == "copy_to":
        spread_over.averaged.copy_to(spread_over.model)
    else:
        with spread_over.averaged.swapped(spread_over.model):
            pass
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "went back"


@pytest.mark.parametrize("write", ["copy_to", "swapped"])
def test_going_back_through_dtensors_that_were_written_is_refused(
    two_ranks: Ranks, write: str
) -> None:
    for said in two_ranks.run(going_back_through_written, write):
        assert "modified by an inplace operation" in said


@pytest.mark.parametrize("way", WAYS)
def test_averages_written_into_a_spread_model(two_ranks: Ranks, way: str) -> None:
    assert two_ranks.run(written_into, way) == [[], []]


def communication_in(way: str) -> int:
    model = spread(perceptron(), way)
    averaged = AveragedWeights(model)
    with CommDebugMode() as seen:
        for _ in range(3):
            averaged.update_parameters(model)
        with averaged.swapped(model):
            pass
    assert averaged._pairing is not None
    parts = averaged._pairing._planned.plan._parts.parts
    assert len(parts) == 1, "one launch of each process"
    return int(seen.get_total_counts())


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_communicated_and_one_launch_does_it_all(two_ranks: Ranks, way: str) -> None:
    assert two_ranks.run(communication_in, way) == [0, 0]


def bits_of_ddp() -> bytes:
    model = spread(perceptron(), "ddp")
    optimizer = trainer(model)
    averaged = ExponentialMovingAverage(model, 0.1)
    with attach(optimizer, model, averaged):
        for number in range(STEPS):
            train(model, optimizer, number, "ddp")
    assert averaged.steps == STEPS
    return b"".join(parameter.numpy().tobytes() for parameter in averaged.module.parameters())


def test_averages_of_ddp_are_equal_without_a_broadcast(two_ranks: Ranks) -> None:
    one, other = two_ranks.run(bits_of_ddp)
    assert one == other


def lists_of_dtensors() -> tuple[bool, str]:
    """What ``torch._foreach_lerp_`` takes as well."""
    model = spread(perceptron(), "fsdp2")
    source = [parameter.detach() for parameter in model.parameters()]
    ours, theirs = ([one.clone().fill_(2.0) for one in source] for _ in range(2))
    for _ in range(3):
        ema_fused.lerp_(ours, source, 0.25)
        torch._foreach_lerp_(theirs, source, 0.25)
    is_equal = all(torch.equal(whole(a), whole(b)) for a, b in zip(ours, theirs, strict=True))
    ema_fused.swap_(ours, theirs)
    ema_fused.copy_(ours, source)
    is_equal &= all(torch.equal(whole(a), whole(b)) for a, b in zip(ours, source, strict=True))
    ours[1] = ours[1].redistribute(placements=[Replicate()])
    try:
        ema_fused.lerp_(ours, source, 0.25)
    except ValueError as error:
        return is_equal, str(error)
    return is_equal, ""


def test_lists_of_dtensors_are_taken_shard_by_shard(two_ranks: Ranks) -> None:
    for is_equal, message in two_ranks.run(lists_of_dtensors):
        assert is_equal
        assert re.match(r"'pair 1' is placed as \(Replicate", message), message


def wrappers_of_tensor_parallel() -> list[str]:
    """The wrappers whose arithmetic is ours to the bit, of a model of DTensors."""
    from diffusers.training_utils import EMAModel

    from ema_fused import adapters

    problems = []
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 3))
    # torch's functions take no list with plain tensors among DTensors.
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    wrappers = {
        "swa_utils": lambda: swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75)
        ),
        "diffusers": lambda: EMAModel(model.parameters(), decay=0.75, foreach=True),
    }
    for name, make in wrappers.items():
        ours, theirs = make(), make()
        adapters.accelerate(ours)
        for number in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    local(parameter).add_(number + 1)
            for wrapper in (ours, theirs):
                if name == "diffusers":
                    wrapper.step(model.parameters())
                else:
                    wrapper.update_parameters(model)
        averages = [
            list(one.shadow_params if name == "diffusers" else one.parameters())
            for one in (ours, theirs)
        ]
        for k, (a, b) in enumerate(zip(*averages, strict=True)):
            if not torch.equal(whole(a), whole(b)):
                problems.append(f"{name} {k}")
    return problems


def test_accelerated_wrappers_take_dtensors(two_ranks: Ranks) -> None:
    pytest.importorskip("diffusers", reason="diffusers isn't installed")
    assert two_ranks.run(wrappers_of_tensor_parallel) == [[], []]
