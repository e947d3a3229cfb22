"""Whole tensors of another package's average become the shards of a sharded model's."""

from __future__ import annotations

import torch

from ema_fused import AveragedWeights
from ema_fused.engine.dtensors import is_sharded
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread, whole


def from_whole_tensors() -> list[str]:
    found = []
    model = spread(perceptron(), "fsdp2")
    averaged = AveragedWeights(model, 0.5)
    averaged.update_parameters(model)
    before = {name: whole(tensor).clone() for name, tensor in averaged.weights.items()}
    torch.manual_seed(0)
    state = {f"module.{name}": torch.randn(one.shape).to(one.dtype) for name, one in before.items()}
    broken = {**state, "n_averaged": torch.tensor(7), "module.last.weight": torch.ones(2, 2)}
    try:
        averaged.load_state_from(broken)
        found.append("another shape is taken")
    except ValueError as error:
        assert "last.weight" in str(error)
    for name, tensor in averaged.weights.items():
        if not torch.equal(whole(tensor), before[name]):
            found.append(f"{name} was changed")
    done = averaged.load_state_from({**state, "n_averaged": torch.tensor(7)})
    if (done.format, done.steps) != ("torch", 7):
        found.append(f"{done}")
    for name, tensor in averaged.weights.items():
        if not torch.equal(whole(tensor), state[f"module.{name}"]):
            found.append(f"{name} isn't what was loaded")
        if is_sharded(tensor) != is_sharded(model.state_dict()[name]):
            found.append(f"{name} isn't sharded as the model's")
    averaged.update_parameters(model)
    if int(averaged.steps) != 8:
        found.append("it doesn't go on")
    return found


def test_whole_tensors_become_shards(two_ranks: Ranks) -> None:
    assert two_ranks.run(from_whole_tensors) == [[], []]
