"""Values loaded into an average that has made no update aren't lost to its first copy."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_fused import AveragedWeights, ExponentialMovingAverage, StochasticWeightAverage
from ema_fused.averages.base import BaseAveragedModel
from tests.networks import conv_net, differences, generator, snapshot, train

KINDS = [ExponentialMovingAverage, AveragedWeights]
MESSAGE = r"values were loaded into an average that had made no update \(steps is 0\)"


class OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


def ones(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}


def into_the_module(averaged: BaseAveragedModel, state: dict[str, Tensor]) -> None:
    averaged.module.load_state_dict(state)


def into_the_average(averaged: BaseAveragedModel, state: dict[str, Tensor]) -> None:
    named = {f"module.{name}": tensor for name, tensor in state.items()}
    averaged.load_state_dict(named, strict=False)


def by_assignment(averaged: BaseAveragedModel, state: dict[str, Tensor]) -> None:
    averaged.module.load_state_dict(state, assign=True)


def by_hand(averaged: BaseAveragedModel, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in averaged.module.named_parameters():
            parameter.copy_(state[name])


WAYS = [into_the_module, into_the_average, by_assignment, by_hand]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_loaded_values_are_the_start_of_the_average(
    way: Callable[..., None], kind: type[ExponentialMovingAverage]
) -> None:
    model = conv_net()
    averaged = kind(model, 0.25)
    way(averaged, ones(model))
    with pytest.warns(UserWarning, match=MESSAGE + r".*steps=1 .* weight 0\.25"):
        averaged.update_parameters(model)
    weight = averaged.module.get_parameter("head.weight")
    assert torch.equal(weight, torch.lerp(torch.ones(31, 67), model.head.weight.detach(), 0.25))
    assert int(averaged.steps) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaged.update_parameters(model)


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (lambda model: ExponentialMovingAverage(model, 0.25, begin_step=5), 0.25),
        (lambda model: StochasticWeightAverage(model), 0.5),
        (OneByOne, 0.5),
        (lambda model: ExponentialMovingAverage(model, 0.25, rounding="stochastic"), 0.25),
        (lambda model: ExponentialMovingAverage(model, 0.25, capturable=True), 0.25),
        (lambda model: ExponentialMovingAverage(model, 0.25, offload="cpu"), 0.25),
        (lambda model: ExponentialMovingAverage(model, 0.25, share_frozen=True), 0.25),
    ],
    ids=["begin_step", "swa", "avg_func", "stochastic", "capturable", "offload", "share_frozen"],
)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_every_kind_keeps_what_was_loaded(
    make: Callable[[nn.Module], BaseAveragedModel], weight: float
) -> None:
    model = conv_net()
    averaged = make(model)
    into_the_module(averaged, ones(model))
    with pytest.warns(UserWarning, match="values were loaded"):
        averaged.update_parameters(model)
    expected = torch.lerp(torch.ones(31, 67), model.head.weight.detach(), weight)
    assert torch.allclose(averaged.module.head.weight, expected)
    assert int(averaged.steps) == 2


def test_what_is_loaded_while_an_average_waits_is_kept_too() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.25, begin_step=5)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    into_the_module(averaged, ones(model))
    with pytest.warns(UserWarning, match="steps is -2"):
        averaged.update_parameters(model)
    assert int(averaged.steps) == 2


def nothing(averaged: BaseAveragedModel, model: nn.Module) -> None:
    pass


def swap(averaged: BaseAveragedModel, model: nn.Module) -> None:
    with averaged.swapped(model):
        pass
    with averaged.swapped(model):
        pass


def exchange(averaged: BaseAveragedModel, model: nn.Module) -> None:
    exchange = averaged.exchange_with(model, averages_alone=True)
    exchange.put_in()
    exchange.take_out()


def convert(averaged: BaseAveragedModel, model: nn.Module) -> None:
    averaged.double()
    averaged.float()


def load_its_own_state(averaged: BaseAveragedModel, model: nn.Module) -> None:
    state = copy.deepcopy(averaged.state_dict())
    averaged.load_state_dict(state)
    averaged.load_state_dict(state, assign=True)


def broadcast(averaged: BaseAveragedModel, model: nn.Module) -> None:
    """As DistributedDataParallel writes all that a module has."""
    with torch.no_grad():
        for tensor in (*averaged.parameters(), *averaged.buffers()):
            tensor.copy_(tensor.clone())
    swap(averaged, model)


def load_and_start_from_the_model(averaged: BaseAveragedModel, model: nn.Module) -> None:
    into_the_module(averaged, ones(model))
    averaged.copy_from(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [None, "foreach"])
@pytest.mark.parametrize(
    "before",
    [
        nothing,
        swap,
        exchange,
        convert,
        load_its_own_state,
        broadcast,
        load_and_start_from_the_model,
    ],
)
@pytest.mark.parametrize("begin_step", [0, 3])
def test_a_first_update_copies_where_nothing_was_loaded(
    begin_step: int,
    before: Callable[..., None],
    backend: str | None,
    kind: type[ExponentialMovingAverage],
) -> None:
    model, random = conv_net(), generator()
    model.conv.requires_grad_(False)
    averaged = kind(model, 0.25, begin_step=begin_step, backend=backend, share_frozen=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, max(1, begin_step) + 1):
            before(averaged, model)
            train(nn.ModuleList([model.hidden, model.head]), random)
            averaged.update_parameters(model)
            assert differences(snapshot(averaged.module), snapshot(model)) == []
            assert int(averaged.steps) == step - max(0, begin_step - 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_know_whether_they_were_loaded(copied: Callable[..., BaseAveragedModel]) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied(averaged).update_parameters(model)
    other = copied(averaged)
    into_the_module(other, ones(model))
    into_the_module(averaged, ones(model))
    for loaded in (other, copied(averaged), averaged):
        with pytest.warns(UserWarning, match="values were loaded"):
            loaded.update_parameters(model)


def test_memory_without_values_is_no_start() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 5)
    averaged = ExponentialMovingAverage(model, 0.25)
    averaged.module.to_empty(device="cpu")
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaged.update_parameters(model)
    assert averaged.module.weight.eq(2.0).all()
    assert int(averaged.steps) == 1


def test_an_average_allocated_and_loaded_keeps_its_values() -> None:
    with torch.device("meta"):
        averaged = ExponentialMovingAverage(nn.Linear(3, 5), 0.25)
    averaged.module.to_empty(device="cpu")
    model = nn.Linear(3, 5)
    into_the_module(averaged, ones(model))
    with pytest.warns(UserWarning, match="values were loaded"):
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.bias, torch.lerp(torch.ones(5), model.bias.detach(), 0.25))


def test_a_state_of_torchs_averaged_model_goes_on() -> None:
    model, random = conv_net(), generator()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    for _ in range(3):
        train(model, random)
        theirs.update_parameters(model)
    averaged = ExponentialMovingAverage(model, 0.25)
    averaged.load_state_dict(theirs.state_dict())
    assert int(averaged.steps) == 3
    train(model, random)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaged.update_parameters(model)
    theirs.update_parameters(model)
    ours, expected = (dict(one.module.named_parameters()) for one in (averaged, theirs))
    assert all(torch.allclose(ours[name], expected[name]) for name in expected)


def test_a_mean_of_torch_goes_on_with_its_weight_at_any_interval() -> None:
    model, random = conv_net(), generator()
    theirs = AveragedModel(model)
    for _ in range(3):
        train(model, random)
        theirs.update_parameters(model)
    averaged = StochasticWeightAverage(model, interval=4)
    averaged.load_state_dict(theirs.state_dict())
    train(model, random)
    averaged.update_parameters(model)
    theirs.update_parameters(model)
    assert torch.allclose(averaged.module.head.weight, theirs.module.head.weight)
    unused = AveragedModel(model)
    averaged.load_state_dict(unused.state_dict())
    assert int(averaged.steps) == 0
