"""Averages keep to the tensors of their model: changed, tied, cached, frozen, or not fitting."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import SlowPathWarning
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.modules import pairing
from tests.networks import (
    CPU_BACKENDS,
    Cached,
    ConvNet,
    Tied,
    conv_net,
    differences,
    generator,
    run,
    snapshot,
    train,
)


class Halves(BaseAveragedModel):
    def momentum_at(self, steps: int) -> float:
        return 0.5


class OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


# Following the tensors.


def count_pairings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made = []
    real = pairing.pair_up

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(pairing, "pair_up", counted)
    return made


def test_modules_are_walked_again_only_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_pairings(monkeypatch)
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.1)
    run(averaged, model, 10)
    assert len(made) == 1
    model.head.weight = nn.Parameter(torch.ones(31, 67))
    run(averaged, model, 10)
    assert len(made) == 2
    averaged.double()  # the tensors are the same objects, of another dtype
    run(averaged, model, 10)
    assert len(made) <= 4


def replace_parameter(model: nn.Module) -> None:
    model.weight = nn.Parameter(model.weight.detach() + 1.0)


def replace_data(model: nn.Module) -> None:
    model.weight.data = model.weight.data + 1.0


def to_double(model: nn.Module) -> None:
    model.double()


def to_bfloat16(model: nn.Module) -> None:
    model.bfloat16()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("side", ["average", "model"])
@pytest.mark.parametrize("change", [replace_parameter, replace_data, to_double, to_bfloat16])
def test_changed_tensors_are_followed(
    change: Callable[[nn.Module], None], side: str, backend: str | None
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    averaged = ExponentialMovingAverage(model, 0.5, backend=backend)
    averaged.update_parameters(model)
    change(averaged.module if side == "average" else model)
    with torch.no_grad():
        model.weight.mul_(2.0)
    before, source = averaged.module.weight.clone(), model.weight.detach()
    averaged.update_parameters(model)
    wide = torch.lerp(before.double(), source.double(), 0.5)
    assert averaged.module.weight.dtype == before.dtype
    tolerance = torch.finfo(before.dtype).eps
    assert torch.allclose(averaged.module.weight.double(), wide, rtol=tolerance, atol=tolerance)
    assert not torch.equal(averaged.module.weight, before)


def test_a_conversion_between_intervals_is_followed() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, interval=3)
    run(averaged, model, 2)
    averaged.double()
    run(averaged, model, 1)
    assert torch.equal(averaged.module.norm.running_mean, model.norm.running_mean.double())


def test_average_and_model_may_be_loaded_by_assignment() -> None:
    model, averaged = conv_net(), ExponentialMovingAverage(conv_net(), 0.5)
    run(averaged, model, 2)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in averaged.state_dict().items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    averaged.load_state_dict(zeros | {"steps": torch.tensor(2)}, assign=True)
    model.load_state_dict(ones, assign=True)
    averaged.update_parameters(model)
    assert all(parameter.eq(0.5).all() for parameter in averaged.parameters())


def test_an_average_in_the_models_own_memory_is_refused() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    averaged.module.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(
        ValueError, match=r"'conv\.weight' of the average is the model's own memory"
    ):
        averaged.update_parameters(model)


def test_tied_weights_are_one_tensor_and_averaged_once() -> None:
    model = Tied()
    averaged = ExponentialMovingAverage(model, 0.25, update_buffers=True)
    with torch.no_grad():
        model.encoder.weight.zero_()
        averaged.update_parameters(model)
        model.encoder.weight.fill_(1.0)
        averaged.update_parameters(model)
    assert averaged.module.decoder.weight is averaged.module.encoder.weight
    assert averaged.module.encoder.weight.unique().tolist() == [0.25]


def test_a_cache_that_only_one_side_has_is_left_alone() -> None:
    model = Cached()
    averaged = ExponentialMovingAverage(model, 0.5)
    averaged.update_parameters(model)
    model.cache = torch.ones(7)
    averaged.update_parameters(model)
    assert averaged.module.cache.tolist() == [0.0, 0.0]
    model.cache = None
    averaged.update_parameters(model)
    averaged.module.cache = None
    model.cache = torch.ones(7)
    averaged.update_parameters(model)
    assert averaged.module.cache is None


def test_a_buffer_replaced_at_every_step_is_followed_and_warned_of_once() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            model.scale = torch.tensor(float(step))
            averaged.update_parameters(model)
            assert averaged.module.scale == step
    (warning,) = caught
    assert warning.category is SlowPathWarning
    assert "'scale' of the model is replaced by a new tensor" in str(warning.message)


# Refusals leave the averages as they were.


def widen(model: nn.Module) -> None:
    model.head = nn.Linear(67, 33)


def widen_data(model: nn.Module) -> None:
    model.head.weight.data = torch.zeros(33, 67)


def make_integer(model: nn.Module) -> None:
    model.scale = torch.tensor(1)


def drop(model: nn.Module) -> None:
    del model.head


def drop_buffer(model: nn.Module) -> None:
    model.scale = None


def to_meta(model: nn.Module) -> None:
    model.to("meta")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", [Halves, OneByOne], ids=["one-launch", "one-by-one"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (widen, ValueError, r"'head\.weight' has shape \(31, 67\) in the average and \(33, 67\)"),
        (
            widen_data,
            ValueError,
            r"'head\.weight' has shape \(31, 67\) in the average",
        ),
        (make_integer, TypeError, r"'scale' is torch\.float32 in the average and torch\.int64"),
        (drop, KeyError, r"missing from the model: head\.weight, head\.bias"),
        (drop_buffer, KeyError, r"missing from the model: scale"),
        (to_meta, ValueError, r"'scale': the source is on the meta device"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_changes(
    change: Callable[[nn.Module], None],
    error: type[Exception],
    message: str,
    kind: type[BaseAveragedModel],
    backend: str | None,
) -> None:
    model = conv_net()
    averaged = kind(model, backend=backend)
    run(averaged, model, 2)
    before = snapshot(averaged)
    change(model)
    for _ in range(2):
        with pytest.raises(error, match=message):
            averaged.update_parameters(model)
        assert differences(snapshot(averaged), before) == []
    if change is not to_meta:
        with pytest.raises(error, match=message):
            averaged.copy_to(model)


# Frozen parameters.


def frozen_net() -> nn.Module:
    model = conv_net()
    model.conv.requires_grad_(False)
    return model


def shares(averaged: BaseAveragedModel, model: nn.Module) -> bool:
    one, other = averaged.module.conv.weight, model.conv.weight
    return one is not other and one.data_ptr() == other.data_ptr() and torch.equal(one, other)


def test_frozen_parameters_share_memory_and_trainable_ones_do_not() -> None:
    model = frozen_net()
    averaged = ExponentialMovingAverage(model, 0.5, share_frozen=True)
    run(averaged, model, 3)
    assert shares(averaged, model)
    assert averaged.module.head.weight.data_ptr() != model.head.weight.data_ptr()
    assert not shares(ExponentialMovingAverage(model, 0.5), model)


def test_sharing_changes_no_average() -> None:
    random, model = generator(), frozen_net()
    shared = ExponentialMovingAverage(model, 0.5, share_frozen=True)
    apart = ExponentialMovingAverage(model, 0.5)
    trainable = nn.ModuleList([model.hidden, model.head])
    for _ in range(5):
        train(trainable, random)
        shared.update_parameters(model)
        apart.update_parameters(model)
    assert differences(snapshot(shared), snapshot(apart)) == []


def test_shared_parameters_follow_a_model_that_moves() -> None:
    model = frozen_net()
    averaged = ExponentialMovingAverage(model, 0.5, share_frozen=True)
    averaged.update_parameters(model)
    model.conv.weight.data = model.conv.weight.data.clone() + 1
    averaged.update_parameters(model)
    assert shares(averaged, model)
    model.double()
    averaged.update_parameters(model)
    assert shares(averaged, model)
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()), assign=True)
    averaged.update_parameters(model)
    assert shares(averaged, model)


def test_a_frozen_parameter_that_becomes_trainable_is_averaged() -> None:
    model = frozen_net()
    averaged = ExponentialMovingAverage(model, 0.5, share_frozen=True, averaged_dtype=torch.float64)
    averaged.update_parameters(model)
    assert averaged.module.conv.weight.dtype == torch.float32
    model.conv.weight.requires_grad_(True)
    averaged.update_parameters(model)
    start = model.conv.weight.detach().clone()
    assert torch.equal(averaged.module.conv.weight, start.double())
    with torch.no_grad():
        model.conv.weight.add_(1.0)
    model.scale = torch.tensor(2.0)  # so that the tensors are paired anew
    averaged.update_parameters(model)
    expected = torch.lerp(start.double(), model.conv.weight.double(), 0.5)
    assert torch.equal(averaged.module.conv.weight, expected)
    assert averaged.module.conv.bias.data_ptr() == model.conv.bias.data_ptr()


def test_no_copy_of_a_shared_parameter_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    real = nn.Parameter.__deepcopy__

    def watched(parameter: nn.Parameter, memo: dict[int, Any]) -> Any:
        copied.append(parameter.data_ptr())
        return real(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", watched)
    model = frozen_net()
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    assert model.head.weight.data_ptr() in copied
    assert model.conv.weight.data_ptr() not in copied
    assert shares(averaged, model)


def test_shared_parameters_are_not_converted_or_moved() -> None:
    model = frozen_net()
    averaged = ExponentialMovingAverage(
        model, device="cpu", share_frozen=True, averaged_dtype=torch.float64
    )
    assert shares(averaged, model)
    averaged.update_parameters(model)
    assert shares(averaged, model)
    assert averaged.module.head.weight.dtype == torch.float64


def test_tied_frozen_parameters_are_shared_under_both_names() -> None:
    model = Tied().requires_grad_(False)
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    averaged.update_parameters(model)
    assert averaged.module.encoder.weight is averaged.module.decoder.weight
    assert averaged.module.encoder.weight.data_ptr() == model.encoder.weight.data_ptr()
    model.requires_grad_(True)
    averaged.update_parameters(model)
    assert averaged.module.encoder.weight is averaged.module.decoder.weight
    assert averaged.module.encoder.weight.data_ptr() != model.encoder.weight.data_ptr()


def test_a_deleted_model_is_not_kept_alive() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    run(averaged, model, 2)
    weight = weakref.ref(model.head.weight)
    del model
    gc.collect()
    assert weight() is None
    run(averaged, conv_net(seed=1), 1)


def test_another_averaged_module_may_take_its_place() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    run(averaged, model, 2)
    first = averaged.module
    averaged.module = copy.deepcopy(model).requires_grad_(False)
    before = snapshot(first)
    run(averaged, model, 1)
    assert differences(snapshot(first), before) == []
    assert not torch.equal(averaged.module.head.weight, first.head.weight)


def shared_parts(model: ConvNet) -> nn.Module:
    """A model made anew of the same parts, as BYOL's forward pass makes it at each update."""
    return nn.Sequential(model.conv, model.norm, model.hidden)


def test_a_model_made_anew_of_the_same_parts_is_the_same_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(shared_parts(model), 0.25)
    averaged.update_parameters(shared_parts(model))
    pairing = averaged._pairing
    expected = snapshot(averaged.module)
    random = generator()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            train(model, random)
            averaged.update_parameters(shared_parts(model))
            for name, now in snapshot(shared_parts(model)).items():
                is_buffer = "running" in name or "tracked" in name
                expected[name] = now if is_buffer else torch.lerp(expected[name], now, 0.25)
    assert averaged._pairing is pairing
    assert differences(snapshot(averaged.module), expected) == []


def test_other_parts_in_a_model_made_anew_are_seen() -> None:
    model, other = conv_net(), conv_net(seed=1)
    averaged = ExponentialMovingAverage(shared_parts(model), 0.5)
    averaged.update_parameters(shared_parts(model))
    before = snapshot(averaged.module)
    mixed = nn.Sequential(model.conv, other.norm, other.hidden)
    averaged.update_parameters(mixed)
    found = snapshot(averaged.module)
    assert torch.equal(found["2.weight"], torch.lerp(before["2.weight"], other.hidden.weight, 0.5))
    # A part that is put into the same place of a living model, and one that comes and goes.
    mixed[2] = model.hidden
    before = snapshot(averaged.module)
    averaged.update_parameters(mixed)
    found = snapshot(averaged.module)
    assert torch.equal(found["2.weight"], torch.lerp(before["2.weight"], model.hidden.weight, 0.5))
    with pytest.raises(KeyError, match=r"unexpected in the model: 3\.weight"):
        averaged.update_parameters(nn.Sequential(*shared_parts(model), nn.Linear(2, 2)))


def test_a_part_with_a_parameter_replaced_between_two_models_is_followed() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(shared_parts(model), 0.5)
    averaged.update_parameters(shared_parts(model))
    before = snapshot(averaged.module)
    model.hidden.weight = nn.Parameter(torch.ones_like(model.hidden.weight))
    averaged.update_parameters(shared_parts(model))
    found = snapshot(averaged.module)
    assert torch.equal(found["2.weight"], torch.lerp(before["2.weight"], model.hidden.weight, 0.5))


def test_new_models_of_new_parts_are_warned_of_although_each_is_gone_by_then() -> None:
    averaged = ExponentialMovingAverage(conv_net(), 0.5)
    with pytest.warns(SlowPathWarning, match="another model object is passed in turn"):
        for _ in range(7):
            averaged.update_parameters(conv_net())


@pytest.mark.parametrize("anew", [False, True], ids=["model", "parts"])
def test_what_is_deleted_is_not_kept_alive(anew: bool) -> None:
    model = conv_net()
    source: nn.Module | None = shared_parts(model) if anew else model
    assert source is not None
    averaged = ExponentialMovingAverage(source, 0.5)
    averaged.update_parameters(source)
    if anew:
        del source
        averaged.update_parameters(shared_parts(model))
    gone = [weakref.ref(model), *(weakref.ref(tensor) for tensor in model.parameters())]
    source = None
    del model
    gc.collect()
    assert [reference for reference in gone if reference() is not None] == []
