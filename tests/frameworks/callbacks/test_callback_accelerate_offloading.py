"""Models whose weights accelerate keeps elsewhere between passes: on the meta device."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from tests.networks import differences, snapshot

KINDS = [ExponentialMovingAverage, AveragedWeights]
CPU = torch.device("cpu")
MESSAGE = r"'0\.weight' of the model is on the meta device: accelerate keeps .* of this Linear"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_to_be_done_is_said_and_works(kind: type[ExponentialMovingAverage]) -> None:
    model = network()
    averaged = kind(model, 0.5)
    averaged.update_parameters(model)
    before = snapshot(averaged)
    cpu_offload(model, execution_device=CPU)
    for action in (averaged.update_parameters, averaged.copy_from, averaged.copy_to):
        with pytest.raises(ValueError, match=MESSAGE):
            action(model)
    with pytest.raises(ValueError, match=MESSAGE), averaged.swapped(model):
        pass
    assert differences(snapshot(averaged), before) == []
    remove_hook_from_submodules(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averaged.update_parameters(model)
    moved = averaged.avg_parameters["0.weight"] - before["module.0.weight"]
    assert torch.allclose(moved, torch.tensor(0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_made_of_an_offloaded_model_says_it_too(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = network()
    cpu_offload(model, execution_device=CPU)
    averaged = kind(model, 0.5)
    with pytest.raises(ValueError, match=MESSAGE):
        averaged.update_parameters(model)


def test_a_frozen_base_may_be_offloaded_under_shared_memory() -> None:
    model = network()
    model[0].requires_grad_(False)
    cpu_offload(model[0], execution_device=CPU)
    averaged = AveragedWeights(model, 0.5, share_frozen=True)
    averaged.update_parameters(model)
    start, inputs = averaged.weights["1.weight"].clone(), torch.ones(4, 3)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    averaged.update_parameters(model)
    assert torch.allclose(averaged.weights["1.weight"], start + 0.5)
    raw = model(inputs)
    with averaged.swapped(model):
        assert not torch.equal(model(inputs), raw)
    assert torch.equal(model(inputs), raw)
