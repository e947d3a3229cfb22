"""Averaged models on a CUDA device, and with the average on another device than the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused.averages import kinds as ours
from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.averages.latest_weights import LatestWeightAverage
from tests.device import DEVICE, needs, nobody_waits
from tests.networks import Tied, conv_net, differences, run, snapshot, train

pytestmark = [
    pytest.mark.gpu,
    # An average on another device than its model has no kernel of its own.
    pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning"),
]


def train_like(model: nn.Module, twin: nn.Module, random: torch.Generator) -> None:
    """Trains ``twin``, on the CPU, and gives ``model`` the same values."""
    train(twin, random)
    model.load_state_dict(twin.state_dict())


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("steps_on", [None, DEVICE], ids=["steps-on-cpu", "steps-on-device"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize(
    "kind", ["StochasticWeightAverage", "ExponentialMovingAverage", "MomentumAnnealingEMA"]
)
def test_updates_do_not_wait_for_the_device(kind: str, interval: int, steps_on: str | None) -> None:
    model = conv_net().to(DEVICE)
    averaged = getattr(ours, kind)(model, interval=interval, device=steps_on)
    for _ in range(3):
        averaged.update_parameters(model)
    with nobody_waits():
        for _ in range(4):
            averaged.update_parameters(model)
    assert averaged.steps == 7


@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind", ["StochasticWeightAverage", "ExponentialMovingAverage", "MomentumAnnealingEMA"]
)
def test_it_is_equal_to_mmengines_to_the_bit(
    kind: str, dtype: torch.dtype, update_buffers: bool
) -> None:
    theirs = pytest.importorskip("mmengine.model.averaged_model", reason="mmengine isn't installed")
    twin = conv_net(dtype=dtype)
    model = copy.deepcopy(twin).to(DEVICE)
    arguments: dict[str, Any] = {"update_buffers": update_buffers}
    if kind != "StochasticWeightAverage":
        arguments["momentum"] = 0.05
    our, their = getattr(ours, kind)(model, **arguments), getattr(theirs, kind)(model, **arguments)
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        train_like(model, twin, random)
        our.update_parameters(model)
        their.update_parameters(model)
        found, expected = snapshot(our), snapshot(their)
        del found["module.norm.num_batches_tracked"]  # theirs stays behind
        del expected["module.norm.num_batches_tracked"]
        assert differences(found, expected) == []


@pytest.mark.parametrize("interval", [1, 2])
def test_an_average_kept_on_the_cpu_is_that_of_the_same_values(interval: int) -> None:
    twin = conv_net()
    model = copy.deepcopy(twin).to(DEVICE)
    averaged = ExponentialMovingAverage(model, 0.1, interval, "cpu", update_buffers=True)
    expected = ExponentialMovingAverage(twin, 0.1, interval, update_buffers=True)
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        train_like(model, twin, random)
        averaged.update_parameters(model)
        expected.update_parameters(twin)
    assert {tensor.device.type for tensor in averaged.state_dict().values()} == {"cpu"}
    assert differences(snapshot(averaged), snapshot(expected)) == []


@pytest.mark.parametrize("averaged_dtype", [None, torch.float64], ids=["swapped", "kept"])
@pytest.mark.parametrize("average_on", ["cpu", None], ids=["average-on-cpu", "same-device"])
def test_weights_are_swapped_in_and_out(
    average_on: str | None, averaged_dtype: torch.dtype | None
) -> None:
    twin = conv_net()
    model = copy.deepcopy(twin).to(DEVICE)
    averaged = ExponentialMovingAverage(
        model, 0.1, device=average_on, averaged_dtype=averaged_dtype
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        train_like(model, twin, random)
        averaged.update_parameters(model)
    raw, average = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        inside = on_cpu(snapshot(model))
        wanted = {name: tensor.to(inside[name].dtype) for name, tensor in on_cpu(average).items()}
        assert differences(inside, wanted) == []
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []


def test_tied_weights_on_two_devices_are_averaged_and_swapped_once() -> None:
    model = Tied().to(DEVICE)
    averaged = ExponentialMovingAverage(model, 0.25, device="cpu")
    for value in (0.0, 1.0):
        with torch.no_grad():
            model.encoder.weight.fill_(value)
        averaged.update_parameters(model)
    assert averaged.module.encoder.weight.unique().tolist() == [0.25]
    with averaged.swapped(model):
        assert model.decoder.weight.unique().tolist() == [0.25]
    assert model.decoder.weight.unique().tolist() == [1.0]
    assert averaged.module.encoder.weight.unique().tolist() == [0.25]


@pytest.mark.parametrize("side", ["average", "model", "both"])
def test_modules_may_be_moved_while_training(side: str) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    run(averaged, model, 2)
    before = snapshot(averaged.module)
    if side != "model":
        averaged.to(DEVICE)
    if side != "average":
        model.to(DEVICE)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    averaged.update_parameters(model)
    expected = torch.lerp(before["head.weight"], model.head.weight.cpu(), 0.5)
    assert torch.allclose(averaged.module.head.weight.cpu(), expected)
    assert averaged.steps == 3


def test_shared_frozen_parameters_follow_the_model_to_the_device() -> None:
    model = conv_net()
    model.conv.requires_grad_(False)
    averaged = ExponentialMovingAverage(model, 0.5, share_frozen=True)
    averaged.update_parameters(model)
    model.to(DEVICE)
    averaged.update_parameters(model)
    assert averaged.module.conv.weight.device == model.conv.weight.device
    assert averaged.module.conv.weight.data_ptr() == model.conv.weight.data_ptr()


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"offload": "cpu"}], ids=str)
def test_what_is_left_out_of_a_copy_elsewhere_is_copied_at_each_update(
    options: dict[str, Any],
) -> None:
    model = conv_net().to(DEVICE)
    averaged = ExponentialMovingAverage(model, 0.25, exclude="head", **options)
    weights = AveragedWeights(model, 0.25, exclude="head", **options)
    for step in range(1, 4):
        for one in (averaged, weights):
            run(one, model, 1, seed=step)
            one.flush()
        assert torch.equal(weights.module.head.weight, model.head.weight)
        assert weights.module.head.weight.data_ptr() == model.head.weight.data_ptr()
        assert weights.module.hidden.weight.device.type == "cpu"
    # Not after the other average's step, as it is a copy where the devices differ.
    averaged.update_parameters(model)
    averaged.flush()
    assert averaged.module.head.weight.device.type == "cpu"
    assert torch.equal(averaged.module.head.weight, model.head.weight.cpu())


@pytest.mark.parametrize("mean_on", [None, "cpu"])
def test_the_latest_checkpoints_are_in_pinned_memory_and_no_step_waits(mean_on: str | None) -> None:
    twin = conv_net()
    model = copy.deepcopy(twin).to(DEVICE)
    ours, expected = LatestWeightAverage(model, 3, 2, mean_on), LatestWeightAverage(twin, 3, 2)
    random = torch.Generator().manual_seed(0)
    for step in range(9):
        train_like(model, twin, random)
        expected.update_parameters(twin)
        if step and mean_on is None:
            with nobody_waits():
                ours.update_parameters(model)
        else:  # buffers on their way to a mean in host memory are waited for
            ours.update_parameters(model)
    assert {one.device.type for one in ours.weights.values()} == {mean_on or DEVICE}
    state, wanted = dict(ours.state_dict()), dict(expected.state_dict())
    assert differences(on_cpu(state), wanted) == []
    window = {name: one for name, one in state.items() if name.startswith("window.0")}
    assert all(one.is_cpu for one in window.values())
    with ours.swapped(model), expected.swapped(twin):
        assert differences(on_cpu(snapshot(model)), snapshot(twin)) == []
    needs("a GPU: without one no memory is pinned")
    assert all(one.is_pinned() for one in window.values())
