"""Averaged weights in the model's place: taken out whatever happens, never saved by mistake."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage, StochasticWeightAverage
from ema_fused.engine import backends
from ema_fused.modules import swapping
from tests.networks import CPU_BACKENDS, Cached, Tied, conv_net, differences, run, snapshot


def trained(
    dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, ExponentialMovingAverage]:
    """A model and its average, which differ."""
    model = conv_net(dtype=dtype)
    averaged = ExponentialMovingAverage(model, 0.25, **options)
    run(averaged, model, 3)
    return model, averaged


def addresses(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
def test_the_model_holds_the_averages_inside_and_its_own_weights_after(
    update_buffers: bool, backend: str | None
) -> None:
    model, averaged = trained(update_buffers=update_buffers, backend=backend)
    raw, average = snapshot(model), snapshot(averaged.module)
    assert differences(raw, average) != []
    parameters, places = list(model.parameters()), addresses(model)
    with averaged.swapped(model) as inside:
        assert inside is model
        assert differences(snapshot(model), average) == []
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert addresses(model) == places
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []


def test_averaged_buffers_are_swapped_too() -> None:
    model, averaged = trained(update_buffers=True)
    mean = averaged.module.norm.running_mean.clone()
    assert not torch.equal(mean, model.norm.running_mean)
    with averaged.swapped(model):
        assert torch.equal(model.norm.running_mean, mean)


def test_the_swapped_model_computes_what_the_average_computes() -> None:
    model, averaged = trained(update_buffers=True)
    model.eval()
    averaged.eval()
    images = torch.rand(3, 1, 8, 8)
    expected = averaged(images)
    assert not torch.allclose(model(images), expected)
    with averaged.swapped(model):
        assert torch.equal(model(images), expected)


class Interruption(BaseException):
    """Like KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interruption, GeneratorExit])
@pytest.mark.parametrize("averaged_dtype", [None, torch.float64], ids=["swapped", "kept"])
def test_weights_return_whatever_is_raised(
    error: type[BaseException], averaged_dtype: torch.dtype | None
) -> None:
    model, averaged = trained(averaged_dtype=averaged_dtype)
    raw, average = snapshot(model), snapshot(averaged.module)
    with pytest.raises(error), averaged.swapped(model):
        raise error
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []
    run(averaged, model, 1)
    assert isinstance(model.state_dict(), dict)
    assert averaged.steps == 4


def test_weights_return_from_a_block_left_early() -> None:
    model, averaged = trained()
    raw = snapshot(model)

    def evaluate() -> int:
        for attempt in range(3):
            with averaged.swapped(model):
                if attempt == 1:
                    return attempt
        return -1

    assert evaluate() == 1
    assert differences(snapshot(model), raw) == []


class Results(TorchDispatchMode):
    """Notes the elements of every tensor that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += [result.numel()] if isinstance(result, Tensor) else []
        return result


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_it_takes_no_memory_where_dtypes_are_equal(backend: str | None) -> None:
    model, averaged = trained(backend=backend)
    with Results() as results, averaged.swapped(model):
        pass
    if backends.pinned(backend) == "foreach" or backends.native() is None:
        # One tensor at a time, in and out.
        assert max(results.elements) == max(p.numel() for p in model.parameters())
    else:
        assert results.elements == []


# Dtypes that differ.


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_dtypes_differ_both_sides_keep_every_bit(
    dtype: torch.dtype, backend: str | None
) -> None:
    model, averaged = trained(dtype, averaged_dtype=torch.float32, backend=backend)
    raw, average = snapshot(model), snapshot(averaged.module)
    rounded = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in average.items()
    }
    assert differences(rounded, raw) != []
    with averaged.swapped(model):
        assert differences(snapshot(model), rounded) == []
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []


def test_a_bfloat16_swa_is_swapped_although_its_updates_have_no_kernel() -> None:
    model = conv_net(dtype=torch.bfloat16)
    averaged = StochasticWeightAverage(model, backend="foreach")
    run(averaged, model, 3)
    average = snapshot(averaged.module)
    with averaged.swapped(model):
        assert differences(snapshot(model), average) == []


# What is refused inside.


def update(averaged: BaseAveragedModel, model: nn.Module) -> None:
    averaged.update_parameters(model)


def update_another_average(averaged: BaseAveragedModel, model: nn.Module) -> None:
    ExponentialMovingAverage(conv_net()).update_parameters(model)


def update_from_a_wrapper(averaged: BaseAveragedModel, model: nn.Module) -> None:
    ExponentialMovingAverage(conv_net()).update_parameters(nn.DataParallel(model))


def swap_again(averaged: BaseAveragedModel, model: nn.Module) -> None:
    with averaged.swapped(model):
        pass


def swap_another_average(averaged: BaseAveragedModel, model: nn.Module) -> None:
    with ExponentialMovingAverage(conv_net()).swapped(model):
        pass


def swap_into_another_model(averaged: BaseAveragedModel, model: nn.Module) -> None:
    with averaged.swapped(conv_net()):
        pass


REFUSED: dict[str, Callable[[BaseAveragedModel, nn.Module], Any]] = {
    "update": update,
    "update-another-average": update_another_average,
    "update-from-a-wrapper": update_from_a_wrapper,
    "swap-again": swap_again,
    "swap-another-average": swap_another_average,
    "swap-into-another-model": swap_into_another_model,
    "copy_to": lambda averaged, model: averaged.copy_to(model),
    "copy_from": lambda averaged, model: averaged.copy_from(model),
    "call": lambda averaged, model: averaged(torch.rand(2, 1, 6, 6)),
    "save-average": lambda averaged, model: averaged.state_dict(),
    "save-averaged-module": lambda averaged, model: averaged.module.state_dict(),
    "save-model": lambda averaged, model: model.state_dict(),
    "save-part-of-model": lambda averaged, model: model.norm.state_dict(),
    "save-wrapped-model": lambda averaged, model: nn.DataParallel(model).state_dict(),
    "save-model-in-parent": lambda averaged, model: nn.ModuleList([model]).state_dict(),
    "load-average": lambda averaged, model: averaged.load_state_dict({}, strict=False),
    "load-model": lambda averaged, model: model.load_state_dict({}, strict=False),
    "deepcopy-average": lambda averaged, model: copy.deepcopy(averaged),
    "pickle-average": lambda averaged, model: pickle.dumps(averaged),
}


@pytest.mark.parametrize("action", REFUSED)
def test_inside_the_block_it_is_refused_and_outside_it_works(action: str) -> None:
    model, averaged = trained()
    raw, average = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        with pytest.raises(RuntimeError, match="Do it outside the block") as raised:
            REFUSED[action](averaged, model)
        assert "while averaged weights are swapped in" in str(raised.value)
        assert differences(snapshot(model), average) == []
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []
    REFUSED[action](averaged, model)


@pytest.mark.parametrize("action", ["update", "swap-again", "save-model", "copy_from"])
def test_another_thread_is_refused_too(action: str) -> None:
    """An evaluation in one thread while another trains."""
    model, averaged = trained()
    raw, average = snapshot(model), snapshot(averaged.module)
    raised: list[BaseException] = []

    def act() -> None:
        try:
            REFUSED[action](averaged, model)
        except RuntimeError as error:
            raised.append(error)

    with averaged.swapped(model):
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
    assert "while averaged weights are swapped in" in str(raised[0])
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []
    assert averaged.steps == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_block_of_its_own() -> None:
    """As the workers of a data loader that is iterated inside."""
    model, averaged = trained()
    raw, average = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        child = os.fork()
        if child == 0:
            os._exit(0 if differences(snapshot(model), average) == [] else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []


def test_nothing_stays_behind_on_the_modules() -> None:
    model, averaged = trained()
    with averaged.swapped(model):
        assert any(module._state_dict_pre_hooks for module in model.modules())
    for module in (*model.modules(), *averaged.modules()):
        assert not module._state_dict_pre_hooks
        assert not module._load_state_dict_pre_hooks
    assert not swapping._swapped


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_model_made_inside_is_an_ordinary_model(
    way: Callable[[nn.Module], nn.Module],
) -> None:
    """The short way to keep the best averaged weights so far."""
    model, averaged = trained()
    average = snapshot(averaged.module)
    with averaged.swapped(model):
        best = way(model)
        assert differences(dict(best.state_dict()), average) == []
    assert differences(dict(best.state_dict()), average) == []
    assert differences(snapshot(best), snapshot(model)) != []


def test_other_models_are_free_meanwhile() -> None:
    model, averaged = trained()
    other, of_other = trained()
    with averaged.swapped(model), of_other.swapped(other):
        third = conv_net()
        run(ExponentialMovingAverage(third), third, 2)
        third.state_dict()
    run(of_other, other, 1)


# Models that don't fit, or change inside.


def test_a_model_that_does_not_fit_is_left_alone() -> None:
    model, averaged = trained()
    model.head = nn.Linear(67, 33)
    raw, average = snapshot(model), snapshot(averaged.module)
    for attempt in (averaged.copy_to, lambda m: averaged.swapped(m).__enter__()):
        with pytest.raises(ValueError, match=r"'head\.weight' has shape"):
            attempt(model)
        assert differences(snapshot(model), raw) == []
        assert differences(snapshot(averaged.module), average) == []
    assert not swapping._swapped
    model.state_dict()


@pytest.mark.parametrize("averaged_dtype", [None, torch.float64], ids=["swapped", "kept"])
def test_parameters_replaced_inside_the_block_get_the_models_weights_back(
    averaged_dtype: torch.dtype | None,
) -> None:
    model, averaged = trained(averaged_dtype=averaged_dtype)
    raw, average = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        model.hidden.weight.data = model.hidden.weight.data.clone()
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("make", [conv_net, Tied], ids=["slots-change", "only-data-changes"])
def test_a_model_converted_inside_the_block_is_reported(
    make: Callable[[], nn.Module], backend: str | None
) -> None:
    model = make()
    averaged = ExponentialMovingAverage(model, 0.25, backend=backend)
    run(averaged, model, 2)
    raw = snapshot(model)
    lost = pytest.raises(RuntimeError, match=r"They are in averaged\.module now")
    with lost, averaged.swapped(model):
        model.half()
    assert differences(snapshot(averaged.module), raw) == []
    assert not swapping._swapped


# Special tensors.


def test_tied_weights_are_swapped_once() -> None:
    model = Tied()
    averaged = ExponentialMovingAverage(model, 0.25)
    run(averaged, model, 3)
    raw, average = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        assert differences(snapshot(model), average) == []
        assert model.decoder.weight is model.encoder.weight
    assert differences(snapshot(model), raw) == []


def test_weights_tied_in_the_model_alone_are_swapped() -> None:
    model = Tied()
    averaged = ExponentialMovingAverage(model, 0.25)
    loose = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    averaged.load_state_dict(loose, assign=True)
    assert averaged.module.decoder.weight is not averaged.module.encoder.weight
    run(averaged, model, 3)
    raw, average = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        assert torch.equal(model.encoder.weight, average["encoder.weight"])
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), average) == []


def test_shared_frozen_parameters_are_not_touched() -> None:
    model = conv_net()
    model.conv.requires_grad_(False)
    averaged = ExponentialMovingAverage(model, 0.25, share_frozen=True)
    trainable = [model.hidden.weight, model.head.weight]
    for _ in range(3):
        averaged.update_parameters(model)
        with torch.no_grad():
            for parameter in trainable:
                parameter.add_(1.0)
    frozen, raw = model.conv.weight.clone(), snapshot(model)
    with averaged.swapped(model):
        assert torch.equal(model.conv.weight, frozen)
        assert not torch.equal(model.head.weight, raw["head.weight"])
    assert differences(snapshot(model), raw) == []
    assert averaged.module.conv.weight.data_ptr() == model.conv.weight.data_ptr()


def test_a_cache_that_grew_is_left_alone() -> None:
    model = Cached()
    averaged = ExponentialMovingAverage(model, 0.25)
    model.cache = torch.ones(9)
    with averaged.swapped(model):
        assert model.cache.tolist() == [1.0] * 9


def test_training_continues_as_if_nothing_had_been_swapped() -> None:
    model, averaged = trained()
    twin, of_twin = trained()
    for one, average, swap in ((model, averaged, True), (twin, of_twin, False)):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
        torch.manual_seed(5)
        for _ in range(4):
            optimizer.zero_grad()
            one(torch.rand(4, 1, 6, 6)).square().mean().backward()
            if swap:
                with average.swapped(one):
                    pass
            optimizer.step()
            average.update_parameters(one)
    assert differences(snapshot(model), snapshot(twin)) == []
    assert differences(snapshot(averaged), snapshot(of_twin)) == []


# copy_to


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy_to_writes_everything_in_the_models_dtype(
    dtype: torch.dtype, backend: str | None
) -> None:
    _, averaged = trained(update_buffers=True, backend=backend)
    average = snapshot(averaged.module)
    target = conv_net(seed=4, dtype=dtype)
    averaged.copy_to(nn.DataParallel(target))
    expected = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in average.items()
    }
    assert differences(snapshot(target), expected) == []
    assert all(parameter.requires_grad for parameter in target.parameters())
    assert differences(snapshot(averaged.module), average) == []


@pytest.mark.parametrize("part", ["overwritten", "swapped"])
def test_an_exchange_follows_a_dtype_that_was_changed_in_place(part: str) -> None:
    """And swaps what it swaps once: twice would be not at all."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    averaged = ExponentialMovingAverage(model, 0.5, averaged_dtype=torch.float32)
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in averaged.module.parameters():
            parameter.fill_(7.0)
    exchange = averaged.exchange_with(model)
    exchange.put_in()
    exchange.take_out()
    for parameter in model[1 if part == "overwritten" else 0].parameters():
        parameter.data = parameter.data.half()
    own = snapshot(model)
    exchange.put_in()
    assert all(bool((parameter == 7.0).all()) for parameter in model.parameters())
    exchange.take_out()
    assert differences(snapshot(model), own) == []
    assert all(bool((p == 7.0).all()) for p in averaged.module.parameters())


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_parameters_tied_through_data_are_swapped_and_copied_once(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight.data = model[0].weight.data
    averaged = kind(model, momentum=0.5)
    averaged.update_parameters(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averaged.update_parameters(model)
    own = model[0].weight.detach().clone()
    expected = averaged.module.state_dict()["1.weight"].clone()
    assert torch.equal(averaged.module.state_dict()["0.weight"], expected)
    with averaged.swapped(model):
        assert torch.equal(model[1].weight, expected)
        assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert torch.equal(model[0].weight, own)
    assert torch.equal(averaged.module.state_dict()["0.weight"], expected)
    averaged.copy_to(model)
    assert torch.equal(model[1].weight, expected)
