"""A momentum for each part of a model, by patterns of names."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights, attach
from ema_fused.averages import schedules
from ema_fused.averages.kinds import ExponentialMovingAverage, MomentumAnnealingEMA
from ema_fused.engine import plan as plans
from tests.networks import CPU_BACKENDS, Tied, conv_net, differences, generator, run, train

KINDS = (ExponentialMovingAverage, AveragedWeights)
BY_NAME: dict[Any, Any] = {r"^head\.": 0.5, re.compile("conv|hidden"): 0.25, "": 0.125}


def number_of(name: str) -> float:
    if name.startswith("head."):
        return 0.5
    return 0.25 if re.search("conv|hidden", name) else 0.125


class Several:
    """Averages of one model at one momentum each, for what is expected."""

    def __init__(self, kind: Any, model: nn.Module, numbers: list[Any], **options: Any) -> None:
        self.of = {number: kind(model, number, **options) for number in numbers}

    def update(self, model: nn.Module, **arguments: Any) -> None:
        for one in self.of.values():
            one.update_parameters(model, **arguments)

    def tensor(self, number: Any, name: str) -> Tensor:
        return self.of[number].module.state_dict()[name]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interval": 2},
        {"every": 3},
        {"begin_step": 3},
        {"update_buffers": True},
        {"update_buffers": "running_mean"},
        {"averaged_dtype": torch.float64},
        {"averaged_dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3},
        {"distance_every": 1},
        {"skip_nonfinite": True},
        {"overlap": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_each_tensor_is_averaged_with_its_own(
    kind: Any, backend: str | None, options: dict[str, Any]
) -> None:
    model = conv_net()
    averaged = kind(model, BY_NAME, backend=backend, **options)
    expected = Several(kind, model, [0.5, 0.25, 0.125], backend=backend, **options)
    random = generator()
    for call in range(8):
        train(model, random)
        flag = torch.tensor(float(call == 5))
        averaged.update_parameters(model, found_inf=flag)
        expected.update(model, found_inf=flag)
        for name, tensor in averaged.module.state_dict().items():
            assert torch.equal(tensor, expected.tensor(number_of(name), name)), (call, name)
    assert averaged.steps == expected.of[0.5].steps


@pytest.mark.parametrize("arithmetic", plans.ARITHMETICS)
def test_every_arithmetic_takes_them(arithmetic: str) -> None:
    model = conv_net()
    averaged = AveragedWeights(model, BY_NAME, arithmetic=arithmetic)
    expected = Several(AveragedWeights, model, [0.5, 0.25, 0.125], arithmetic=arithmetic)
    random = generator()
    for _ in range(4):
        train(model, random)
        averaged.update_parameters(model)
        expected.update(model)
    for name, tensor in averaged.weights.items():
        assert torch.equal(tensor, expected.tensor(number_of(name), name))


def test_a_function_of_the_step_may_stand_for_a_number() -> None:
    fall: Callable[[int], float] = schedules.mean
    model = conv_net()
    averaged = ExponentialMovingAverage(model, {"head": fall, "": 0.125}, every=2)
    expected = Several(ExponentialMovingAverage, model, [fall, 0.125], every=2)
    random = generator()
    for _ in range(7):
        train(model, random)
        averaged.update_parameters(model)
        expected.update(model)
    for name, parameter in averaged.module.named_parameters():
        whose = fall if "head" in name else 0.125
        assert torch.equal(parameter, expected.tensor(whose, name))
    assert averaged.momentum_at(3) == {"head": 0.25, "": 0.125}


def test_zero_keeps_and_one_follows() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, {"conv": 0, "head": 1, "": 0.5})
    run(averaged, model, 1)
    first = averaged.module.conv.weight.clone()
    run(averaged, model, 3)
    assert torch.equal(averaged.module.conv.weight, first)
    assert torch.equal(averaged.module.head.weight, model.head.weight)
    assert not torch.equal(averaged.module.hidden.weight, model.hidden.weight)


def test_names_are_those_of_the_plain_model() -> None:
    model = conv_net()
    wrapped = nn.DataParallel(model)
    for kind in KINDS:
        averaged = kind(wrapped, {r"^head\.": 1.0, r"^(conv|norm|hidden)\.": 0.25})
        run(averaged, wrapped, 3)
        assert torch.equal(dict(averaged.named_parameters()).popitem()[1], model.head.bias)


def test_weights_are_listed_once_as_long_as_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    lerp = plans.Plan.lerp_
    monkeypatch.setattr(
        plans.Plan,
        "lerp_",
        lambda plan, weight, **rest: (given.append(weight), lerp(plan, weight, **rest))[1],
    )
    model = conv_net()
    momentum = {"head": lambda step: 0.5 if step < 3 else 0.25, "": 0.125}
    averaged = ExponentialMovingAverage(model, momentum)
    run(averaged, model, 6)
    assert [len(weights) for weights in given] == [len(model.state_dict())] * 5
    assert given[0] is given[1] and given[2] is given[3] is given[4]
    assert given[0] != given[2]


def test_states_are_saved_copied_and_resumed_as_ever() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, dict(BY_NAME))
    run(averaged, model, 3)
    file = io.BytesIO()
    torch.save(averaged.state_dict(), file)
    file.seek(0)
    loaded = ExponentialMovingAverage(model, dict(BY_NAME))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    others = [loaded, copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))]
    assert averaged.state_dict().keys() == ExponentialMovingAverage(model).state_dict().keys()
    random = generator(5)
    for _ in range(3):
        train(model, random)
        for one in (averaged, *others):
            one.update_parameters(model)
    for other in others:
        assert differences(dict(other.state_dict()), dict(averaged.state_dict())) == []
    with averaged.swapped(model):
        pass


def test_it_may_be_changed_while_training() -> None:
    model = conv_net()
    momentum = {"head": 0.5, "": 0.125}
    averaged = ExponentialMovingAverage(model, momentum)
    run(averaged, model, 2)
    momentum["head"] = 1.0
    run(averaged, model, 1, seed=1)
    assert torch.equal(averaged.module.head.weight, model.head.weight)
    averaged.momentum = {"conv": 1.0, "": 0.0}
    kept = averaged.module.head.weight.clone()
    run(averaged, model, 1, seed=2)
    assert torch.equal(averaged.module.conv.weight, model.conv.weight)
    assert torch.equal(averaged.module.head.weight, kept)
    averaged.momentum = 1.0
    run(averaged, model, 1, seed=3)
    assert torch.equal(averaged.module.head.weight, model.head.weight)
    averaged.momentum = {"conv": 0.5}
    with pytest.raises(ValueError, match=r"no pattern for 'norm\.weight'"):
        run(averaged, model, 1)


def test_from_a_number_to_names_while_training() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    run(averaged, model, 3)
    averaged.momentum = {"head": 1.0, "": 0.0}
    kept = averaged.module.conv.weight.clone()
    run(averaged, model, 2, seed=1)
    assert torch.equal(averaged.module.head.weight, model.head.weight)
    assert torch.equal(averaged.module.conv.weight, kept)
    assert averaged.steps == 5


@pytest.mark.parametrize("mapping", [OrderedDict, MappingProxyType])
def test_any_mapping_will_do(mapping: Any) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, mapping({"head": 1.0, "": 0.0}))
    run(averaged, model, 3)
    assert torch.equal(averaged.module.head.weight, model.head.weight)


def test_attached_it_follows_the_optimizer() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedWeights(model, {"head": 1.0, "": 0.01})
    with attach(optimizer, model, averaged):
        for _ in range(3):
            model(torch.randn(2, 1, 8, 8)).sum().backward()
            optimizer.step()
    assert averaged.steps == 3
    assert torch.equal(averaged.weights["head.weight"], model.head.weight)


def test_adapters_alone_need_a_momentum_where_the_rest_is_shared() -> None:
    model = conv_net()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    averaged = ExponentialMovingAverage(model, {"^head": 0.5}, share_frozen=True)
    run(averaged, model, 3)
    model.hidden.requires_grad_(True)
    before = averaged.module.head.weight.clone()
    with pytest.raises(ValueError, match=r"no pattern for 'hidden\.weight'"):
        run(averaged, model, 1)
    assert torch.equal(averaged.module.head.weight, before)
    assert averaged.steps == 3


def test_16_bits_lose_what_the_smallest_is() -> None:
    model = conv_net(dtype=torch.bfloat16)
    averaged = ExponentialMovingAverage(model, {"head": 0.5, "norm": 0.0, "": 0.0001})
    with pytest.warns(UserWarning, match=r"the momentum is 0\.0001"):
        run(averaged, model, 2)


class OneByOne(ExponentialMovingAverage):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        pass


@pytest.mark.parametrize(
    ("momentum", "error", "words"),
    [
        ({}, ValueError, r"no pattern for 'conv\.weight'"),
        ({"head": 0.5}, ValueError, "no pattern for .*: {..., '': 0.001}"),
        ({"haed": 0.5, "": 0.1}, ValueError, "'haed' counts for no averaged tensor"),
        ({"": 0.1, "head": 0.5}, ValueError, "'head' counts .* an earlier pattern is found"),
        ({"running_mean": 0.5, "": 0.1}, ValueError, "'running_mean' counts for no averaged"),
        ({"(head": 0.5, "": 0.1}, ValueError, "momentum: '\\(head' is no regular expression"),
        ({3: 0.5}, TypeError, "momentum: 3 is no pattern"),
        ({"": 1.5}, ValueError, r"momentum of '' is 1\.5; a number in \[0, 1\] is expected"),
        ({"": math.nan}, ValueError, "momentum of '' is nan"),
        ({"": "0.1"}, TypeError, "momentum of '' is '0.1'; a number"),
        ({"": None}, TypeError, "momentum of '' is None; a number"),
        ([0.1, 0.2], TypeError, r"momentum is \[0\.1, 0\.2\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(momentum: Any, error: Any, words: str) -> None:
    for kind in KINDS:
        with pytest.raises(error, match=words):
            kind(conv_net(), momentum)


def test_tied_tensors_have_one_momentum() -> None:
    with pytest.raises(ValueError, match=r"are one tensor .*0\.5 for the first and 0\.1 for"):
        ExponentialMovingAverage(Tied(), {"encoder": 0.5, "decoder": 0.1})
    averaged = ExponentialMovingAverage(Tied(), {"encoder": 0.5, "decoder": 0.5})
    model = Tied()
    run(averaged, model, 3)
    assert averaged.module.encoder.weight is averaged.module.decoder.weight


@pytest.mark.parametrize("option", [{"offload": "cpu"}, {"capturable": True}], ids=str)
def test_options_for_one_number_are_refused(option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"a momentum by name with {name}=.* leave {name} out"):
        ExponentialMovingAverage(conv_net(), BY_NAME, **option)


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_they_are_refused_for_such_options_later_too() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, offload="cpu")
    run(averaged, model, 2)
    before = averaged.module.conv.weight.clone()
    averaged.momentum = {"": 0.1}
    with pytest.raises(ValueError, match="a momentum by name with offload='cpu'"):
        run(averaged, model, 1)
    assert torch.equal(averaged.module.conv.weight, before)
    assert averaged.steps == 2
    averaged.momentum = 0.25
    run(averaged, model, 1)
    assert averaged.steps == 3


def test_other_kinds_take_a_number_alone() -> None:
    with pytest.raises(TypeError, match=r"a number in \(0, 1\) is expected"):
        MomentumAnnealingEMA(conv_net(), BY_NAME)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="OneByOne averages by its own avg_func"):
        OneByOne(conv_net(), BY_NAME)


def test_a_model_without_tensors_stands_for_any() -> None:
    for kind in KINDS:
        kind(nn.Identity(), BY_NAME, update_buffers=["running", "scale"])
        with pytest.raises(ValueError, match="is no regular expression"):
            kind(nn.Identity(), BY_NAME, update_buffers="(")
        with pytest.raises(ValueError, match=r"a number in \[0, 1\]"):
            kind(nn.Identity(), {"": 3})


def test_a_large_one_is_taken_for_a_mistake() -> None:
    with pytest.warns(UserWarning, match=r"would be momentum=0\.001"):
        ExponentialMovingAverage(conv_net(), {"head": 0.999, "": 0.001})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExponentialMovingAverage(conv_net(), {"head": 1.0, "": 0.001})


@pytest.mark.parametrize("returned", [None, "none", 1.5, math.nan, torch.ones(2)], ids=str)
def test_a_function_that_returns_no_momentum_is_named(returned: Any) -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, {"head": lambda step: returned, "": 0.1})
    run(averaged, model, 1)
    before = averaged.module.conv.weight.clone()
    with pytest.raises((TypeError, ValueError), match=r"momentum .* for 'head', step 1; a number"):
        run(averaged, model, 1)
    assert torch.equal(averaged.module.conv.weight, before)
    assert averaged.steps == 1
