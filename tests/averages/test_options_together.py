"""Options of averages that meet in one update: each keeps its promise beside the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.averages.base import BaseAveragedModel
from tests.networks import generator, train

KINDS = [ExponentialMovingAverage, AveragedWeights]
INFINITE = float("inf")


class Masked(nn.Module):
    """A network with a causal mask, a queue and statistics among its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((3, 3), -INFINITE).triu(1))
        self.register_buffer("queue", torch.zeros(5))
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).relu() - self.running_mean)


def trained_step(model: Masked, random: torch.Generator) -> None:
    mask = model.mask.clone()
    train(model, random)
    model.mask.copy_(mask)


def by_hand(before: Tensor, source: Tensor, momentum: float) -> Tensor:
    return torch.lerp(before, source, momentum)


@pytest.mark.parametrize("kind", KINDS)
def test_momenta_by_name_chosen_buffers_and_a_mask(kind: type[Any]) -> None:
    model, random = Masked(), generator()
    averaged = kind(
        model,
        {r"^head\.": 0.5, r"mask": 0.3, r"": 0.1},
        update_buffers=[r"mask", r"running"],
        version_counters=True,
    )
    averaged.update_parameters(model)
    tensors = dict(averaged.avg_parameters)
    assert "running_mean" in tensors and "queue" not in tensors
    for _ in range(4):
        trained_step(model, random)
        before = {n: t.detach().clone() for n, t in averaged._averages().state_dict().items()}
        versions = {n: t._version for n, t in averaged._averages().state_dict().items()}
        averaged.update_parameters(model)
        after = averaged._averages().state_dict()
        source = model.state_dict()
        for name in ("head.weight", "head.bias"):
            assert torch.equal(after[name], by_hand(before[name], source[name], 0.5))
        for name in ("body.weight", "body.bias", "running_mean"):
            assert torch.equal(after[name], by_hand(before[name], source[name], 0.1))
        assert torch.equal(after["queue"], source["queue"])
        assert torch.equal(after["mask"], model.mask)
        assert all(after[name]._version > versions[name] for name in after)


def test_a_mask_that_is_masked_out_less_takes_its_own_momentum() -> None:
    model = Masked()
    averaged = ExponentialMovingAverage(model, {"mask": 0.5, "": 0.1}, update_buffers="mask")
    averaged.update_parameters(model)
    with torch.no_grad():
        model.mask[1, 0] = 2.0
    averaged.update_parameters(model)
    assert averaged.module.mask[1, 0] == 1.0
    assert averaged.module.mask[0, 1] == -INFINITE


@pytest.mark.parametrize("kind", KINDS)
def test_adopting_keeps_the_options(kind: type[Any]) -> None:
    model, random = Masked(), generator()
    averaged = kind(model, {"head": 0.5, "": 0.1}, update_buffers="running", version_counters=True)
    for _ in range(3):
        trained_step(model, random)
        averaged.update_parameters(model)
    kept = averaged._averages().state_dict()["body.weight"].clone()
    with torch.no_grad():
        model.head = nn.Linear(4, 3)
    model.register_buffer("running_var", torch.ones(2))
    adopted = averaged.adopt(model)
    assert adopted.resized == ["head.weight", "head.bias"]
    assert adopted.started == ["running_var"]
    assert torch.equal(averaged._averages().state_dict()["body.weight"], kept)
    trained_step(model, random)
    before = {n: t.clone() for n, t in averaged._averages().state_dict().items()}
    averaged.update_parameters(model)
    after, source = averaged._averages().state_dict(), model.state_dict()
    assert torch.equal(
        after["head.weight"], by_hand(before["head.weight"], source["head.weight"], 0.5)
    )
    assert torch.equal(
        after["running_var"], by_hand(before["running_var"], source["running_var"], 0.1)
    )
    assert int(averaged.steps) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_isnt_finite_is_left_out_beside_the_rest(kind: type[Any]) -> None:
    model, random = Masked(), generator()
    averaged = kind(model, {"head": 0.5, "": 0.1}, update_buffers=True, skip_nonfinite=True)
    for _ in range(3):
        trained_step(model, random)
        averaged.update_parameters(model)
    before = copy.deepcopy(dict(averaged.state_dict()))
    own = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    averaged.update_parameters(model)
    assert all(torch.equal(now, before[name]) for name, now in averaged.state_dict().items())
    with torch.no_grad():
        model.head.weight.copy_(own)
    averaged.update_parameters(model)
    assert int(averaged.steps) == int(before["steps"]) + 1


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_loaded_average_that_was_swapped_is_still_its_start(dtype: torch.dtype | None) -> None:
    model = Masked()
    averaged = ExponentialMovingAverage(model, 0.1, averaged_dtype=dtype, update_buffers=True)
    loaded = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    averaged.module.load_state_dict(loaded)
    with averaged.swapped(model):
        assert torch.equal(model.head.weight, loaded["head.weight"])
    with pytest.warns(UserWarning, match="values were loaded into an average"):
        averaged.update_parameters(model)
    own = model.head.weight.to(dtype or torch.float32)
    expected = by_hand(loaded["head.weight"].to(own.dtype), own, 0.1)
    assert torch.equal(averaged.module.head.weight, expected)


def test_a_swap_or_a_copy_isnt_a_load() -> None:
    for version_counters in (None, True):
        model, random = Masked(), generator()
        averaged: BaseAveragedModel = ExponentialMovingAverage(
            model, 0.1, version_counters=version_counters
        )
        with averaged.swapped(model):
            pass
        averaged.copy_from(model)
        trained_step(model, random)
        averaged.update_parameters(model)  # copies: nothing was loaded
        assert torch.equal(averaged.module.head.weight, model.head.weight)
