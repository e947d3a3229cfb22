"""Averages of spread models whose states are loaded, or whose tensors get other memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema_fused import AveragedWeights
from ema_fused.engine.dtensors import local, replace_local
from ema_fused.saving.checkpoints import averaged_state_dict, load_averaged_state_dict
from tests import sharded_models
from tests.modules.sharded_beside import Beside, differing, state_of
from tests.ranks import Ranks
from tests.sharded_models import WAYS, perceptron, spread, trainer, whole, whole_weights


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
