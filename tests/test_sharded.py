"""Averages of models that are spread over processes, beside those of one process, to the bit."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import pytest
import sharded_models
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded_models import WAYS, perceptron, spread, train, trainer, whole, whole_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import swa_utils

import ema_fused
from ema_fused import AveragedWeights, ExponentialMovingAverage, attach, schedules
from ema_fused.checkpoints import averaged_state_dict, load_averaged_state_dict
from ema_fused.copying import FrozenShares
from ema_fused.sharding import is_sharded, local, replace_local
from ema_fused.swapping import exchange_of_everything

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffers": {"update_buffers": True},
    "double": {"averaged_dtype": torch.float64},
    "interval": {"interval": 2},
    "every": {"every": 2},
    "schedule": {"momentum": partial(schedules.annealing, momentum=0.05, gamma=3)},
    "mean": {"momentum": schedules.mean, "arithmetic": "delta"},
}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in {**one, **other}
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


def state_of(averaged: AveragedWeights, model: nn.Module) -> dict[str, Tensor]:
    return {
        name: whole(tensor)
        for name, tensor in averaged_state_dict(averaged, model, full_state_dict=True).items()
    }


class Beside:
    """A spread model with its average, and the average of the same weights in one process."""

    def __init__(self, way: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.way = way
        self.model = spread(perceptron().to(dtype), way)
        self.optimizer = trainer(self.model)
        options = {"momentum": 0.1, **options}
        self.averaged = AveragedWeights(self.model, **options)
        self.plain = perceptron().to(dtype)
        self.reference = AveragedWeights(self.plain, **options)

    def step(self, number: int) -> None:
        train(self.model, self.optimizer, number, self.way)
        self.averaged.update_parameters(self.model)
        self.plain.load_state_dict(whole_weights(self.model))
        self.reference.update_parameters(self.plain)

    def differing(self) -> list[str]:
        return differing(state_of(self.averaged, self.model), dict(self.reference.state_dict()))


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


def whole_states() -> list[str]:
    """Whole tensors are loaded by the rules of ``load_state_dict``."""
    found = []
    model = spread(perceptron(), "fsdp2")
    owned = AveragedWeights(model, 0.5, rounding="stochastic", seed=3)
    owned.update_parameters(model)
    state = averaged_state_dict(owned, model, full_state_dict=True)
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["module.first.weight"].fill_(9.0)
    model.first.requires_grad_(False)
    before = whole_weights(model)
    shared = AveragedWeights(model, 0.5, share_frozen=True)
    load_averaged_state_dict(shared, model, dict(state))
    found += differing(before, whole_weights(model))
    if not whole(shared.weights["first.weight"]).eq(9.0).all():
        found.append("what was trained is not loaded")
    misspelt = dict(state)
    misspelt["module.last.wieght"] = misspelt.pop("module.last.weight")
    try:
        load_averaged_state_dict(AveragedWeights(model, share_frozen=True), model, misspelt)
        found.append("a misspelt name is taken")
    except RuntimeError as error:
        assert "last.wieght" in str(error)
    without_seed = {name: one for name, one in state.items() if name != "rounding_seed"}
    load_averaged_state_dict(owned, model, without_seed)
    assert owned.rounding_seed == 3
    return found


def test_whole_states_are_loaded_as_any_others(two_ranks: Ranks) -> None:
    assert two_ranks.run(whole_states) == [[], []]


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
    parts = averaged._pairing._everything._parts
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


def loaded_in(way: str) -> list[str]:
    beside = Beside(way)
    for number in range(3):
        beside.step(number)
    problems = []
    for full in (False, True):
        # As averaged_state_dict() shows the averages in place where it can, they are copied here.
        state = averaged_state_dict(beside.averaged, beside.model, full_state_dict=full)
        state = {name: tensor.clone() for name, tensor in state.items()}
        fresh = AveragedWeights(beside.model, 0.1)
        load_averaged_state_dict(fresh, beside.model, state)
        assert fresh.steps == 3
        problems += differing(
            state_of(fresh, beside.model), state_of(beside.averaged, beside.model)
        )
    problems += differing(whole_weights(beside.model), dict(beside.plain.state_dict()))
    brought = averaged_state_dict(
        beside.averaged, beside.model, full_state_dict=True, cpu_offload=True
    )
    if dist.get_rank() == 0:
        problems += differing(brought, dict(beside.reference.state_dict()))
    else:
        assert brought == {}
    return problems


@pytest.mark.parametrize("way", WAYS)
def test_states_are_loaded_whole_or_in_shards(two_ranks: Ranks, way: str) -> None:
    assert two_ranks.run(loaded_in, way) == [[], []]


def moved_and_replaced() -> list[str]:
    """What FSDP2 does to its shards: other memory under the same parameters, other parameters."""
    beside = Beside("fsdp2")
    beside.step(0)
    before = [local(one) for one in beside.model.parameters()]
    beside.model.double()
    beside.model.float()
    assert all(
        local(one) is not shard
        for one, shard in zip(beside.model.parameters(), before, strict=True)
    )
    beside.step(1)
    found = beside.differing()
    # As FSDP2 pads a shard that load_state_dict(assign=True) has put in: the same parameter.
    with torch.no_grad():
        for parameter in beside.model.parameters():
            replace_local(parameter, local(parameter).clone().add_(1))
        for parameter in beside.plain.parameters():
            parameter.add_(1)
    beside.averaged.update_parameters(beside.model)
    beside.reference.update_parameters(beside.plain)
    found += beside.differing()
    last = beside.model.last
    last.weight = nn.Parameter(last.weight.detach().clone())
    beside.optimizer = trainer(beside.model)
    with torch.no_grad():
        local(last.weight).fill_(2.0)
    beside.averaged.update_parameters(beside.model)
    beside.plain.load_state_dict(
        {name: whole(tensor) for name, tensor in beside.model.state_dict().items()}
    )
    beside.reference.update_parameters(beside.plain)
    return found + beside.differing()


def test_shards_that_get_other_memory_are_followed(two_ranks: Ranks) -> None:
    assert two_ranks.run(moved_and_replaced) == [[], []]


def frozen_shards() -> tuple[int, list[str]]:
    model = spread(perceptron(), "fsdp2")
    model.first.requires_grad_(False)
    averaged = AveragedWeights(model, 0.5, share_frozen=True)
    held = [
        name
        for name, tensor in averaged.weights.items()
        if name.startswith("first.")
        and local(tensor).data_ptr() == local(dict(model.named_parameters())[name]).data_ptr()
    ]
    saved = [name for name in averaged.state_dict() if "first" in name]
    averaged.update_parameters(model)
    model.first.requires_grad_(True)
    for value in (1.0, 3.0):
        with torch.no_grad():
            local(model.first.weight).fill_(value)
        averaged.update_parameters(model)
    shard = local(averaged.weights["first.weight"])
    assert shard.data_ptr() != local(model.first.weight).data_ptr()
    # Its own from the value 1 on.
    assert shard.eq(2.0).all(), shard
    return len(held), saved


def test_frozen_shards_are_shared_until_they_train(two_ranks: Ranks) -> None:
    assert two_ranks.run(frozen_shards) == [(2, [])] * 2


def materialised_later() -> list[str]:
    with torch.device("meta"):
        model = spread(sharded_models.Perceptron(), "fsdp2")
    averaged = AveragedWeights(model, 0.5)
    assert all(tensor.is_meta for tensor in averaged.weights.values())
    try:
        averaged.load_state_dict(averaged.state_dict())
    except RuntimeError as error:
        assert "copy_from(model)" in str(error)
    else:
        raise AssertionError("a value was loaded into no memory")
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            local(tensor).fill_(4.0)
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).fill_(8.0)
    averaged.update_parameters(model)
    return [
        name
        for name, parameter in model.named_parameters()
        if not local(averaged.weights[name]).eq(6.0).all()
    ]


def test_averages_of_a_model_without_memory_get_it_later(two_ranks: Ranks) -> None:
    assert two_ranks.run(materialised_later) == [[], []]


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


def refusals() -> list[str]:
    def said(action: Any) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    found = []
    sharded = spread(perceptron(), "fsdp2")
    found.append(said(lambda: ExponentialMovingAverage(sharded)))
    early = AveragedWeights(perceptron())
    before = {name: tensor.clone() for name, tensor in early.weights.items()}
    found.append(said(lambda: early.update_parameters(sharded)))
    assert not differing(before, early.weights)
    mesh = init_device_mesh("cpu", (2,))
    otherwise = perceptron()
    otherwise.first.weight = nn.Parameter(
        distribute_tensor(otherwise.first.weight.detach(), mesh, [Replicate()])
    )
    average = AveragedWeights(otherwise)
    otherwise.first.weight = nn.Parameter(
        otherwise.first.weight.detach().redistribute(placements=[Shard(0)])
    )
    found.append(said(lambda: average.update_parameters(otherwise)))
    sums = perceptron()
    sums.scale = nn.Parameter(DTensor.from_local(torch.ones(1), mesh, [Partial()]))
    found.append(said(lambda: AveragedWeights(sums).update_parameters(sums)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flattened = spread(perceptron(), "fsdp1")
    found.append(said(lambda: ExponentialMovingAverage(flattened)))
    found.append(said(lambda: AveragedWeights(flattened).state_dict()))
    rounded = AveragedWeights(flattened, averaged_dtype=torch.float64)
    found.append(said(lambda: averaged_state_dict(rounded, flattened)))
    return found


def test_what_cannot_be_is_refused_with_what_to_do(two_ranks: Ranks) -> None:
    expected = [
        "TypeError: FSDPPerceptron is sharded by FSDP, .*AveragedWeights",
        "TypeError: 'scale' is a DTensor in the model and a plain tensor in the average.*"
        "Shard the model first",
        r"ValueError: 'first.weight' is placed as \(Replicate\(\),\).* in the average and as "
        r"\(Shard\(dim=0\),\)",
        "TypeError: 'scale' is placed as .*sums over processes.*redistribute",
        "TypeError: FullyShardedDataParallel is sharded by FSDP, .*AveragedWeights",
        r"RuntimeError: FSDP1 flattens.*averaged_state_dict\(averaged, model\)",
        "ValueError: '.*' has another dtype in the average.*FSDP1 would round",
    ]
    for found in two_ranks.run(refusals):
        for message, pattern in zip(found, expected, strict=True):
            assert re.match(pattern, message, re.DOTALL), message


def test_partitioned_parameters_of_zero_3_are_refused() -> None:
    model = perceptron()
    average = AveragedWeights(model)
    # As DeepSpeed leaves a parameter that others hold a part of.
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_numel = 7, parameter.numel()
        parameter.data = torch.empty(0)
    message = r"'scale' is partitioned by DeepSpeed ZeRO-3 \(ds_id 7\).*ZeRO-1 or ZeRO-2"
    for make in (AveragedWeights, ExponentialMovingAverage):
        with pytest.raises(TypeError, match=message):
            make(model)
    before = {name: tensor.clone() for name, tensor in average.weights.items()}
    with pytest.raises(TypeError, match=message):
        average.update_parameters(model)
    assert not differing(before, average.weights)
