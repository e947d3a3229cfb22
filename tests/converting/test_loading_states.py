"""``averaged.load_state_from``: what it takes, and what it refuses before it writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_fused import (
    AveragedWeights,
    BaseAveragedModel,
    CosineEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    PowerFunctionEMA,
    SlowPathWarning,
    StochasticWeightAverage,
)
from tests.converting.originals_of_averages import Tensors, copied, model, train

KINDS = (
    ExponentialMovingAverage,
    StochasticWeightAverage,
    MomentumAnnealingEMA,
    CosineEMA,
    AveragedWeights,
)


def made(kind: Any, net: nn.Module, **options: Any) -> Any:
    if kind is CosineEMA:
        options["max_iters"] = 100
    return kind(net, **options)


def torch_state(net: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(steps):
        train(net, step)
        average.update_parameters(net)
    return average.state_dict()


def weights_of(averaged: BaseAveragedModel) -> Tensors:
    return copied(averaged.module.state_dict())


def assert_holds(averaged: BaseAveragedModel, state: Any, prefix: str = "module.") -> None:
    for name, tensor in averaged.module.state_dict().items():
        assert torch.equal(tensor, state[prefix + name]), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_average_takes_a_state_and_averages_on(kind: Any) -> None:
    net = model()
    state = torch_state(net)
    averaged = made(kind, net)
    done = averaged.load_state_from(state)
    assert (done.format, done.steps, done.kept, done.decay) == ("torch", 3, (), None)
    assert_holds(averaged, state)
    before = weights_of(averaged)
    train(net, 3)
    weight = averaged.momentum_at(3)
    averaged.update_parameters(net)
    expected = torch.lerp(before["0.weight"], net[0].weight.detach(), weight)  # type: ignore[index]
    torch.testing.assert_close(averaged.module.state_dict()["0.weight"], expected)
    assert int(averaged.steps) == 4


def test_what_was_passed_is_not_changed() -> None:
    net = model()
    state = torch_state(net)
    before = copied(state)
    averaged = ExponentialMovingAverage(net)
    averaged.load_state_from({"ema": state, "epoch": 3})
    train(net, 3)
    averaged.update_parameters(net)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_counts_of_averages_become_counts_of_calls() -> None:
    net = model()
    averaged = ExponentialMovingAverage(net, interval=5)
    assert averaged.load_state_from(torch_state(net)).steps == 15
    assert averaged.load_state_from(torch_state(net), steps=7).steps == 7


def test_a_wrapper_s_names_are_those_of_the_model() -> None:
    net = model()
    state = torch_state(net)
    wrapped = {
        name.replace("module.", "module._orig_mod."): tensor for name, tensor in state.items()
    }
    averaged = ExponentialMovingAverage(net)
    averaged.load_state_from(wrapped)
    assert_holds(averaged, state)


@pytest.mark.parametrize("fault", ["name", "more", "shape", "kind"])
def test_a_state_of_another_model_is_refused_and_nothing_is_changed(fault: str) -> None:
    net = model()
    state = dict(torch_state(net))
    if fault == "name":
        state["module.3.weight"] = state.pop("module.2.weight")
    elif fault == "more":
        state["module.9.weight"] = torch.ones(3)
    elif fault == "shape":
        state["module.2.weight"] = torch.ones(3, 8)
    else:
        state["module.2.weight"] = torch.ones(3, 7, dtype=torch.int64)
    averaged = ExponentialMovingAverage(net)
    averaged.update_parameters(net)
    before = weights_of(averaged)
    with pytest.raises((KeyError, ValueError, TypeError), match=r"\d\.weight"):
        averaged.load_state_from(state)
    assert int(averaged.steps) == 1
    assert_holds(averaged, before, "")


def test_steps_that_a_format_does_not_keep_are_asked_for() -> None:
    net = model()
    state = {"state_dict_ema": torch_state(net)}
    state = {"state_dict_ema": {n[7:]: t for n, t in state["state_dict_ema"].items() if "." in n}}
    averaged = ExponentialMovingAverage(net)
    done = averaged.load_state_from(state)
    assert done.steps == 1
    assert any("pass steps=" in one for one in done.lost)
    assert averaged.load_state_from(state, steps=30).lost == ()
    train(net, 5)
    before = weights_of(averaged)
    averaged.update_parameters(net)  # averages: it is no first call, which would copy
    assert not torch.equal(averaged.module.state_dict()["0.weight"], net.state_dict()["0.weight"])
    assert not torch.equal(averaged.module.state_dict()["0.weight"], before["0.weight"])


def test_another_momentum_than_the_state_s_is_told() -> None:
    net = nn.Linear(3, 2)
    state = {
        "decay": 0.99,
        "num_updates": None,
        "shadow_params": [torch.ones(2, 3), torch.ones(2)],
        "collected_params": None,
    }
    averaged = ExponentialMovingAverage(net, momentum=0.01)
    done = averaged.load_state_from(state, steps=4)
    assert (done.format, done.decay, done.steps) == ("torch-ema", 0.99, 4)
    with pytest.warns(UserWarning, match=r"decay 0\.99, momentum 0\.01"):
        ExponentialMovingAverage(net, momentum=0.002).load_state_from(state, steps=4)
    state["num_updates"] = 4
    done = averaged.load_state_from(state)
    assert done.steps == 5 and "warm-up" in done.lost[0]


def test_a_list_of_another_length_is_refused() -> None:
    net = model()
    state = {"decay": 0.9, "num_updates": 1, "shadow_params": [torch.ones(3)]}
    with pytest.raises(ValueError, match="has 1 tensors, and 5 parameters"):
        ExponentialMovingAverage(net).load_state_from(state)


def test_precision_that_is_lost_is_told() -> None:
    net = model().to(torch.bfloat16)
    state = torch_state(model())
    averaged = AveragedWeights(net)
    assert any("torch.float32" in one for one in averaged.load_state_from(state).lost)
    wide = AveragedWeights(net, averaged_dtype=torch.float32)
    assert wide.load_state_from(state).lost == ()
    assert_holds(wide, state)


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_shared_frozen_parameters_stay_the_model_s(kind: Any) -> None:
    net = model()
    net[0].requires_grad_(False)
    state = torch_state(copy.deepcopy(net))
    state["module.0.bias"] = net[0].bias.detach().clone()
    averaged = kind(net, share_frozen=True)
    own = net[0].weight.detach().clone()
    done = averaged.load_state_from(state)
    assert len(done.lost) == 1 and "keep the model's: '0.weight'" in done.lost[0]
    assert torch.equal(net[0].weight, own)
    assert torch.equal(averaged.module.state_dict()["0.weight"], own)
    assert torch.equal(averaged.module.state_dict()["2.weight"], state["module.2.weight"])
    assert "0.weight" in averaged.shared_names


def test_torchtitan_s_averages_are_read_from_its_distributed_checkpoint(tmp_path: Path) -> None:
    net = model()
    averages = {name: torch.randn_like(one) for name, one in net.named_parameters()}
    state = {f"state.{name}.ema_params": one for name, one in averages.items()}
    state_dict_saver.save(
        {"model": net.state_dict(), "ema": state, "train_state": {"step": 4}},
        checkpoint_id=tmp_path / "step-4",
        no_dist=True,
    )
    averaged = AveragedWeights(net)
    done = averaged.load_state_from(tmp_path / "step-4", steps=4)
    assert (done.format, done.steps) == ("torchtitan", 4)
    assert set(done.kept) == {name for name, _ in net.named_buffers()}
    for name, tensor in averages.items():
        assert torch.equal(averaged.weights[name], tensor)


def test_plain_weights_are_averages_only_if_that_is_said() -> None:
    net = model()
    published = {"state_dict": copied(torch_state(net)), "meta": {}}
    published = {"state_dict": {n[7:]: t for n, t in published["state_dict"].items() if "." in n}}
    averaged = ExponentialMovingAverage(net)
    with pytest.raises(ValueError, match="holds no average of a known format") as error:
        averaged.load_state_from(published)
    assert "state_dict_ema" in str(error.value) and "'0.weight'" in str(error.value)
    done = averaged.load_state_from(published, source="weights", steps=9)
    assert (done.format, done.steps) == ("weights", 9)
    assert_holds(averaged, published["state_dict"], "")


def test_several_averages_are_listed_and_one_is_chosen_by_key() -> None:
    net = model()
    states = {"fast": torch_state(copy.deepcopy(net)), "slow": torch_state(model(1))}
    averaged = ExponentialMovingAverage(net)
    with pytest.raises(ValueError, match=r"several averages: torch at key 'fast', torch at key"):
        averaged.load_state_from(states)
    averaged.load_state_from(states, key="slow")
    assert_holds(averaged, states["slow"])


def test_power_function_averages_are_told_apart() -> None:
    net = model()
    average = PowerFunctionEMA(net)
    average.update_parameters(net)
    with pytest.raises(ValueError, match="PowerFunctionEMA"):
        ExponentialMovingAverage(net).load_state_from(average.state_dict())


@pytest.mark.filterwarnings("ignore", category=SlowPathWarning)
def test_an_offloaded_average_takes_a_state() -> None:
    net = model()
    state = torch_state(net)
    averaged = ExponentialMovingAverage(net, momentum=0.1, offload="cpu")
    averaged.update_parameters(net)
    averaged.load_state_from(state)
    train(net, 3)
    averaged.update_parameters(net)
    averaged.flush()
    expected = torch.lerp(state["module.0.weight"], net[0].weight.detach(), 0.1)
    assert torch.equal(averaged.module.state_dict()["0.weight"], expected)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_mean_that_goes_on_by_a_momentum_is_told(as_file: bool, tmp_path: Path) -> None:
    net = model()
    mean = StochasticWeightAverage(net)
    mean.update_parameters(net)
    mean.update_parameters(net)
    state: Any = mean.state_dict()
    if as_file:
        torch.save(state, tmp_path / "mean.pt")
        state = tmp_path / "mean.pt"
    with pytest.warns(UserWarning, match="the state is of a mean of all values"):
        ExponentialMovingAverage(net).load_state_from(state)
    StochasticWeightAverage(net).load_state_from(state)
