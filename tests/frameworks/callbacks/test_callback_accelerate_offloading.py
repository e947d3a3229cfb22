"""Models whose weights accelerate keeps elsewhere between passes: on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from tests.networks import differences, snapshot

KINDS = [ExponentialMovingAverage, AveragedWeights]
CPU = torch.device("cpu")
MESSAGE = r"'0\.weight' of the model is on the meta device: accelerate keeps .* of this Linear"


def network() -> nn.Module:
    """A batch norm, and two layers of one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 2))
    return tied(model)


def tied(model: nn.Module) -> nn.Module:
    """Again, that is: accelerate gives each layer its own weight back."""
    model[2].weight = model[0].weight
    return model


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name, from where accelerate keeps them."""
    found: dict[str, torch.Tensor] = dict(model[0]._hf_hook.weights_map.dataset)
    return found


def trained_on(weights: dict[str, torch.Tensor]) -> None:
    """As an optimizer of the kept weights does."""
    with torch.no_grad():
        for memory in {w.data_ptr(): w for w in weights.values() if w.is_floating_point()}.values():
            memory.mul_(0.75).add_(0.125)


def trained() -> tuple[nn.Module, ExponentialMovingAverage]:
    """The same without accelerate."""
    model = network()
    averaged = ExponentialMovingAverage(model, 0.5)
    for _ in range(3):
        averaged.update_parameters(model)
        trained_on(model.state_dict())
    return model, averaged


def test_weights_are_averaged_where_they_are_kept() -> None:
    model = network()
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    averaged = AveragedWeights(model, 0.5)
    inputs = torch.randn(8, 3)
    for _ in range(3):
        averaged.update_parameters(model)
        trained_on(kept(model))
        with torch.no_grad():
            model.eval()(inputs)  # each pass puts new parameters into the modules
    plain, expected = trained()
    assert differences(averaged.weights, expected.module.state_dict()) == []
    assert averaged.weights["0.weight"].data_ptr() == averaged.weights["2.weight"].data_ptr()
    with torch.no_grad():
        raw = model(inputs)
        with averaged.swapped(model):
            assert torch.equal(model(inputs), expected.module.eval()(inputs))
        assert torch.equal(model(inputs), raw)
        assert torch.equal(raw, plain.eval()(inputs))
        averaged.copy_to(model)
        assert torch.equal(model(inputs), expected.module(inputs))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_goes_on_when_its_model_is_offloaded(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = network()
    averaged = kind(model, 0.5)
    averaged.update_parameters(model)
    trained_on(model.state_dict())
    cpu_offload(model, execution_device=CPU)
    averaged.update_parameters(model)
    trained_on({name: w for name, w in kept(model).items() if "running" not in name})
    # Buffers are where they were: here they were not to be offloaded.
    trained_on({name: b for name, b in model.named_buffers() if b.is_floating_point()})
    averaged.update_parameters(model)
    _, expected = trained()
    assert differences(averaged.module.state_dict(), expected.module.state_dict()) == []
    remove_hook_from_submodules(model)
    averaged.update_parameters(tied(model))


def test_values_put_in_another_place_are_found() -> None:
    model = network()
    cpu_offload(model, execution_device=CPU)
    averaged = AveragedWeights(model, 0.5)
    averaged.update_parameters(model)
    before = averaged.weights["3.weight"].clone()
    model[3]._hf_hook.weights_map.dataset["3.weight"] = before + 1.0
    averaged.update_parameters(model)
    assert torch.allclose(averaged.weights["3.weight"], before + 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_on_disk_is_refused_and_words_say_what_to_do(
    kind: type[ExponentialMovingAverage], tmp_path: Path
) -> None:
    model = network()
    averaged = kind(model, 0.5)
    averaged.update_parameters(model)
    before = snapshot(averaged)
    disk_offload(model, tmp_path, execution_device=CPU)
    for action in (averaged.update_parameters, averaged.copy_from, averaged.copy_to):
        with pytest.raises(ValueError, match=MESSAGE):
            action(model)
    with pytest.raises(ValueError, match=MESSAGE), averaged.swapped(model):
        pass
    assert differences(snapshot(averaged), before) == []
    remove_hook_from_submodules(model)
    averaged.update_parameters(tied(model))


def test_a_callable_average_made_of_an_offloaded_model_says_so() -> None:
    model = network()
    cpu_offload(model, execution_device=CPU)
    averaged = ExponentialMovingAverage(model, 0.5)
    with pytest.raises(ValueError, match=MESSAGE):
        averaged.update_parameters(model)


def test_a_frozen_base_may_be_offloaded_under_shared_memory() -> None:
    model = network()
    model[0].requires_grad_(False)
    cpu_offload(model[0], execution_device=CPU)
    averaged = AveragedWeights(model, 0.5, share_frozen=True)
    averaged.update_parameters(model)
    start, inputs = averaged.weights["3.weight"].clone(), torch.ones(4, 3)
    with torch.no_grad():
        model[3].weight.add_(1.0)
    averaged.update_parameters(model)
    assert torch.allclose(averaged.weights["3.weight"], start + 0.5)
    raw = model.eval()(inputs)
    with averaged.swapped(model):
        assert not torch.equal(model(inputs), raw)
    assert torch.equal(model(inputs), raw)
