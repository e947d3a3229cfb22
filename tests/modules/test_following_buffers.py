"""Buffers that are copies of the model's follow its shapes, and new ones join them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.averages.base import BaseAveragedModel
from tests.networks import conv_net, differences, generator, run, snapshot, train

KINDS = [ExponentialMovingAverage, AveragedWeights]


class OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begins", ["before the first batch", "after it"])
def test_quantization_aware_training_is_averaged_from_its_first_batch_on(
    begins: str, kind: type[ExponentialMovingAverage]
) -> None:
    """Observers of channels find their shapes in the first forward pass, and resize in place."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).train()
    model.qconfig = get_default_qat_qconfig("fbgemm")
    model = prepare_qat(model)
    images = torch.randn(2, 3, 5, 5)
    if begins == "after it":
        model(images)
    averaged = kind(model, 0.25)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(images).sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        assert averaged.module.get_buffer("0.weight_fake_quant.scale").shape == (8,)
        with averaged.swapped(model):
            model(images)
    assert averaged._pairing is not None
    assert averaged._pairing.holds(averaged.module, model, False)
    theirs, ours = dict(model.named_buffers()), dict(averaged.module.named_buffers())
    averaged.update_parameters(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def larger(model: nn.Module) -> None:
    model.scale = torch.arange(3.0)


def larger_in_place(model: nn.Module) -> None:
    model.scale.resize_(3).fill_(2.0)


def later(model: nn.Module) -> None:
    model.norm.register_buffer("later", torch.arange(4))
    model.norm.register_buffer("bounds", torch.arange(4.0))


@pytest.mark.parametrize("change", [larger, larger_in_place, later])
@pytest.mark.parametrize(
    "make",
    [
        *[lambda model, kind=kind: kind(model, 0.5) for kind in KINDS],
        OneByOne,
        lambda model: ExponentialMovingAverage(model, 0.5, interval=7),
        lambda model: ExponentialMovingAverage(model, 0.5, averaged_dtype=torch.float64),
        lambda model: ExponentialMovingAverage(nn.DataParallel(model), 0.5),
        lambda model: ExponentialMovingAverage(model, 0.5, backend="foreach"),
        lambda model: ExponentialMovingAverage(model, 0.5, offload="cpu"),
    ],
    ids=["copy", "weights", "one-by-one", "interval", "float64", "wrapped", "foreach", "offload"],
)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_they_take_the_models_shapes_and_the_rest_goes_on(
    make: Callable[[nn.Module], BaseAveragedModel], change: Callable[[nn.Module], None]
) -> None:
    model, other = conv_net(), conv_net()
    averaged, unchanged = make(model), make(other)
    run(averaged, model, 3)
    run(unchanged, other, 3)
    change(model)
    for one, its_model in ((averaged, model), (unchanged, other)):
        random = generator(1)
        for _ in range(4):
            train(nn.ParameterList(its_model.parameters()), random)
            one.update_parameters(its_model)
    # A copy of it, loaded and resumed, has the new structure.
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))
    ours = {name.removeprefix("module."): t for name, t in snapshot(averaged.module).items()}
    for name, tensor in model.named_buffers():
        assert torch.equal(ours[name], tensor.to(ours[name].dtype))
        assert ours[name].is_floating_point() == tensor.is_floating_point()
    floats = {tensor.dtype for tensor in ours.values() if tensor.is_floating_point()}
    assert len(floats) == 1
    for name, expected in unchanged.module.named_parameters():
        assert torch.equal(averaged.module.get_parameter(name), expected)


def not_only_a_buffer(model: Any) -> None:
    larger(model)
    later(model)
    model.head = nn.Linear(67, 33)


def gone(model: Any) -> None:
    del model.scale


def none(model: Any) -> None:
    model.scale = None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error"), [(not_only_a_buffer, ValueError), (gone, KeyError), (none, KeyError)]
)
def test_where_more_has_changed_nothing_follows(
    change: Callable[[nn.Module], None],
    error: type[Exception],
    kind: type[ExponentialMovingAverage],
) -> None:
    model = conv_net()
    averaged = kind(model, 0.5)
    run(averaged, model, 2)
    before = snapshot(averaged)
    change(model)
    for update in (averaged.update_parameters, averaged.copy_from):
        with pytest.raises(error, match=r"averaged\.adopt\(model\)"):
            update(model)
        assert differences(snapshot(averaged), before) == []
    averaged.adopt(model)
    averaged.update_parameters(model)


@pytest.mark.parametrize("change", [larger, later])
def test_averaged_buffers_do_not_follow(change: Callable[[nn.Module], None]) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, update_buffers=True)
    run(averaged, model, 2)
    before = snapshot(averaged)
    change(model)
    with pytest.raises((KeyError, ValueError), match=r"averaged\.adopt\(model\)"):
        averaged.update_parameters(model)
    assert differences(snapshot(averaged), before) == []


def test_another_model_does_not_get_or_give_shapes_by_copy_to() -> None:
    model, plain = conv_net(), conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    larger(model)
    run(averaged, model, 2)
    with pytest.raises(ValueError, match=r"'scale' has shape \(3,\) in the average and \(\)"):
        averaged.copy_to(plain)
    assert averaged.module.scale.shape == (3,)
