"""``include`` and ``exclude`` of spread models: what is left out is each process's own part."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused import AveragedWeights
from ema_fused.engine.dtensors import local
from ema_fused.saving import checkpoints
from ema_fused.saving.checkpoints import averaged_state_dict, load_averaged_state_dict
from tests.modules.sharded_beside import Beside, differing, state_of
from tests.ranks import Ranks
from tests.sharded_models import WAYS, perceptron, spread, whole_weights

LEFT_OUT = {"last.weight", "last.bias"}


def left_out_in(way: str, folder: str) -> list[str]:
    beside = Beside(way, exclude="^last")
    averaged, model = beside.averaged, beside.model
    assert averaged.shared_names == LEFT_OUT
    for number in range(3):
        beside.step(number)
    problems = beside.differing()
    with CommDebugMode() as communication:
        averaged.update_parameters(model)
    beside.reference.update_parameters(beside.plain)
    assert communication.get_total_counts() == 0

    theirs = {
        name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): local(parameter)
        for name, parameter in model.named_parameters()
    }
    for name, tensor in averaged.module.named_parameters():
        one_place = local(tensor).data_ptr() == theirs[name].data_ptr()
        if local(tensor).numel() and one_place != (name in LEFT_OUT):
            problems.append(f"{name} is in the wrong memory")

    before = whole_weights(model)
    exchange = averaged.exchange_with(model)
    exchange.put_in()
    inside = whole_weights(model)
    exchange.take_out()
    problems += [name for name in LEFT_OUT if not torch.equal(inside[name], before[name])]
    problems += differing(whole_weights(model), before)
    if torch.equal(inside["first.weight"], before["first.weight"]):
        problems.append("nothing was swapped")

    # Saved, loaded into an average of other weights, and by other numbers of processes.
    path = f"{folder}/{way}"
    saved = averaged_state_dict(averaged, model)
    assert not {f"module.{name}" for name in LEFT_OUT} & set(saved)
    checkpoints.save({"averaged": saved}, path)
    kept = state_of(averaged, model)
    for full in (False, True):
        fresh = AveragedWeights(model, 0.1, exclude="^last")
        state = averaged_state_dict(fresh, model, full_state_dict=full)
        state = {name: tensor.clone() for name, tensor in state.items()}
        checkpoints.load({"averaged": state}, path)
        load_averaged_state_dict(fresh, model, state)
        # Each process has statistics of its own, and a checkpoint the first one's.
        loaded = state_of(fresh, model)
        problems += [name for name in differing(loaded, kept) if "running_" not in name]
        assert fresh.shared_names == LEFT_OUT
    problems += differing(whole_weights(model), before)

    # The state of an average of everything doesn't touch the model.
    everything = AveragedWeights(model, 0.1)
    everything.update_parameters(model)
    state = averaged_state_dict(everything, model, full_state_dict=True)
    state = {
        name: tensor.clone() if name == "steps" else torch.full_like(tensor, 2)
        for name, tensor in state.items()
    }
    load_averaged_state_dict(fresh, model, state)
    problems += differing(whole_weights(model), before)
    if not state_of(fresh, model)["module.first.weight"].eq(2).all():
        problems.append("nothing was loaded")
    return problems


@pytest.mark.parametrize("way", WAYS)
def test_each_process_shares_its_own_part(two_ranks: Ranks, way: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert two_ranks.run(left_out_in, way, folder) == [[], []]


def choices_by_tensors() -> list[str]:
    """A function is given the whole shape of a parameter; all processes leave out the same."""
    asked = {}

    def is_small(name: str, tensor: torch.Tensor) -> bool:
        asked[name] = tuple(tensor.shape)
        return tensor.numel() < 14

    model = spread(perceptron(), "fsdp2")
    averaged = AveragedWeights(model, exclude=is_small)
    assert asked["first.weight"] == (13, 7)
    names: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names, averaged.left_out_names)
    assert names[0] == names[1]
    return names[0]


def test_a_function_sees_whole_shapes(two_ranks: Ranks) -> None:
    small = ["scale", "first.bias", "norm.weight", "norm.bias", "last.bias"]
    assert two_ranks.run(choices_by_tensors) == [small, small]
