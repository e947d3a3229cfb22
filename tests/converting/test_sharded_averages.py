"""Whole tensors of another package's average become the shards of a sharded model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights, BiasCorrectedEMA, LatestWeightAverage
from ema_fused.converting import convert
from ema_fused.engine.dtensors import is_sharded
from ema_fused.saving import checkpoints
from ema_fused.saving.first_process import by_the_first
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


_WITH_PARTS: dict[str, Callable[[nn.Module], Any]] = {
    "window.": lambda model: LatestWeightAverage(model, 2),
    "initial.": BiasCorrectedEMA,
}


def whole_state(averaged: Any) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in averaged.state_dict().items()}


def with_their_parts(folder: Path) -> list[str]:
    """What a window holds, and what an average has begun with, are shards too."""
    found = []
    for part, kind in _WITH_PARTS.items():
        model = spread(perceptron(), "fsdp2")
        averaged = kind(model)
        for step in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(step + 1)
            averaged.update_parameters(model)
        there = folder / part
        state = checkpoints.averaged_state_dict(averaged, model)
        checkpoints.save({"averaged": state}, there / "shards")
        with by_the_first() as is_first:
            if is_first:
                convert(there / "shards", "ema_fused", there / "whole.safetensors")
        for path in (there / "shards", there / "whole.safetensors"):
            fresh = kind(spread(perceptron(1), "fsdp2"))
            done = fresh.load_state_from(path)
            if (done.parts, done.lost, done.steps) != ((part,), (), 3):
                found.append(f"{path}: {done}")
            own, expected = whole_state(fresh), whole_state(averaged)
            found += [
                f"{path}: {name}" for name in expected if not torch.equal(own[name], expected[name])
            ]
    return found


def test_parts_of_a_class_become_shards(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(with_their_parts, tmp_path) == [[], []]


def test_whole_tensors_become_shards(two_ranks: Ranks) -> None:
    assert two_ranks.run(from_whole_tensors) == [[], []]
