"""Average and model with a part left out: swapped, saved, loaded, copied, adopted, exported."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.saving.export import model_state_dict
from tests.averages.left_out import HEAD, KINDS, expect_shared, make
from tests.networks import (
    conv_net,
    differences,
    generator,
    run,
    snapshot,
    train,
)


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_leaves_it_alone(kind: Any) -> None:
    model = conv_net()
    averaged = make(kind, model, exclude="head")
    run(averaged, model, 3)
    before, averages = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        assert differences(snapshot(model), averages) == []
        assert differences(snapshot(averaged.module), before) == []
        expect_shared(averaged, model, HEAD)
    assert differences(snapshot(model), before) == []
    exchange = averaged.exchange_with(model, averages_alone=True)
    exchange.put_in()
    assert torch.equal(model.hidden.weight, averages["hidden.weight"])
    exchange.take_out()
    assert differences(snapshot(model), before) == []


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_gets_it_too(kind: Any) -> None:
    model, other = conv_net(), conv_net(seed=1)
    averaged = make(kind, model, exclude="head")
    run(averaged, model, 3)
    training, before, averages = snapshot(model), snapshot(other), snapshot(averaged.module)
    with averaged.swapped(other):
        assert differences(snapshot(other), averages) == []
        assert differences(snapshot(model), training) == []
        with torch.no_grad():
            other.head.weight.zero_()  # isn't for the model that trains
    assert differences(snapshot(other), before) == []
    assert differences(snapshot(model), training) == []
    averaged.copy_to(other)
    assert differences(snapshot(other), averages) == []
    assert differences(snapshot(model), training) == []
    expect_shared(averaged, model, HEAD)
    run(averaged, other, 1)  # trains from here on
    expect_shared(averaged, other, HEAD)


def test_states_have_it_or_not_and_are_loaded_either_way() -> None:
    model = conv_net()
    callable_one = make(ExponentialMovingAverage, model, exclude="head")
    weights = make(AveragedWeights, model, exclude="head")
    run(callable_one, model, 2)
    run(weights, model, 2)
    everything = {key for key in callable_one.state_dict() if key.startswith("module.")}
    assert everything == {f"module.{name}" for name in model.state_dict()}
    assert everything - set(weights.state_dict()) == {f"module.{name}" for name in HEAD}

    fresh_model = conv_net(seed=2)
    before = snapshot(fresh_model)
    for state in (callable_one.state_dict(), weights.state_dict(), make_whole(model).state_dict()):
        for kind in KINDS:
            fresh = make(kind, fresh_model, exclude="head")
            fresh.load_state_dict(copy.deepcopy(state))
            assert differences(snapshot(fresh_model), before) == []
            assert fresh.steps == state["steps"]
            assert torch.equal(fresh.module.hidden.weight, state["module.hidden.weight"])
            if kind is AveragedWeights or "module.head.weight" not in state:
                expect_shared(fresh, fresh_model, HEAD)
            else:  # a copy that is called without a model has what was saved
                assert torch.equal(fresh.module.head.weight, state["module.head.weight"])
            fresh.update_parameters(fresh_model)
            expect_shared(fresh, fresh_model, HEAD)
    misspelt = weights.state_dict()
    misspelt["module.hidden.wieght"] = misspelt.pop("module.hidden.weight")
    with pytest.raises(RuntimeError, match="wieght"):
        make(AveragedWeights, fresh_model, exclude="head").load_state_dict(misspelt)


def make_whole(model: nn.Module) -> ExponentialMovingAverage:
    averaged: ExponentialMovingAverage = make(ExponentialMovingAverage, model)
    run(averaged, model, 1)
    return averaged


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_to_the_bit(kind: Any) -> None:
    model, random = conv_net(), generator()
    averaged = make(kind, model, exclude="head")

    def step(averaged: BaseAveragedModel, model: nn.Module) -> None:
        train(model, random)
        averaged.update_parameters(model)

    for _ in range(3):
        step(averaged, model)
    saved = copy.deepcopy((model.state_dict(), averaged.state_dict())), random.get_state()
    for _ in range(3):
        step(averaged, model)
    resumed = conv_net(seed=5)
    again = make(kind, resumed, exclude="head")
    resumed.load_state_dict(saved[0][0])
    again.load_state_dict(saved[0][1])
    random.set_state(saved[1])
    for _ in range(3):
        step(again, resumed)
    assert differences(snapshot(again.module), snapshot(averaged.module)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_stand_alone_until_their_next_update(kind: Any, copied: Any) -> None:
    model = conv_net()
    averaged = make(kind, model, exclude="head")
    run(averaged, model, 2)
    then = snapshot(averaged.module)
    one = copied(averaged)
    run(averaged, model, 1)
    assert differences(snapshot(one.module), then) == []
    other = conv_net(seed=3)
    one.copy_to(other)
    assert differences(snapshot(other), then) == []
    assert one.left_out_names == averaged.left_out_names
    run(one, model, 1)
    expect_shared(one, model, HEAD)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_model_is_taken_over(kind: Any) -> None:
    model = conv_net()
    averaged = make(kind, model, exclude="head")
    run(averaged, model, 3)
    kept = averaged.module.hidden.weight.clone()
    model.head = nn.Linear(67, 9)
    model.head_2 = nn.Linear(3, 3)
    averaged.adopt(model, resize=lambda name, old, new: pytest.fail(f"resized {name}"))
    assert torch.equal(averaged.module.hidden.weight, kept)
    expect_shared(averaged, model, HEAD | {"head_2.weight", "head_2.bias"})
    del model.head, model.head_2  # what the patterns name is gone
    averaged.adopt(model)
    assert averaged.left_out_names == [] and averaged.shared_names == set()


def test_copies_that_are_left_out_are_adopted_as_the_model_has_them() -> None:
    model = conv_net()
    averaged = make(ExponentialMovingAverage, model, exclude="head", averaged_dtype=torch.float64)
    run(averaged, model, 2)
    kept = averaged.module.hidden.weight.clone()
    train(model, generator(7))
    averaged.adopt(model)
    assert torch.equal(averaged.module.head.weight, model.head.weight.double())
    assert torch.equal(averaged.module.hidden.weight, kept)


def test_weights_are_exported_with_it() -> None:
    model = conv_net()
    averaged = make(AveragedWeights, model, exclude="head")
    run(averaged, model, 3)
    train(model, generator(9))
    assert torch.equal(averaged.weights["head.weight"], model.head.weight)
    plain = conv_net(seed=4)
    plain.load_state_dict(model_state_dict(model, averaged.weights))
    assert torch.equal(plain.head.weight, model.head.weight)
    assert torch.equal(plain.hidden.weight, averaged.module.hidden.weight)
