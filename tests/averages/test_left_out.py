"""``include`` and ``exclude``: what is left out is the model's own, the rest is averaged."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ema_fused import AveragedWeights, CosineEMA, ExponentialMovingAverage, attach
from ema_fused.averages.kinds import ExpMomentumEMA, MomentumAnnealingEMA, StochasticWeightAverage
from ema_fused.saving.checkpoints import averaged_state_dict
from tests.averages.left_out import HEAD, KINDS, OneByOne, expect_shared, make, parameters
from tests.networks import (
    ConvNet,
    Tied,
    conv_net,
    differences,
    own,
    run,
    snapshot,
)
from tests.wrapper_tensors import Wrapped


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() > 1


def starts_the_head(name: str, tensor: Tensor) -> bool:
    return name.startswith("head.") and tensor.numel() > 0


# Each with the names that it leaves out.
CHOICES: list[tuple[dict[str, Any], set[str]]] = [
    ({"exclude": "head"}, HEAD),
    ({"exclude": re.compile(r"^head\.")}, HEAD),
    ({"exclude": [r"head\.weight$", r"head\.bias$"]}, HEAD),
    ({"exclude": starts_the_head}, HEAD),
    ({"include": ("conv", "norm", "hidden")}, HEAD),
    ({"include": is_matrix}, {"conv.bias", "norm.weight", "norm.bias", "head.bias"}),
    ({"include": "head|hidden", "exclude": "bias"}, {"conv.weight", "conv.bias", "norm.weight"}),
]
CHOICES[-1][1].update({"norm.bias", "head.bias"})


@pytest.mark.parametrize(
    "kind",
    [
        *KINDS,
        StochasticWeightAverage,
        MomentumAnnealingEMA,
        ExpMomentumEMA,
        CosineEMA,
        OneByOne,
    ],
)
@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_the_rest_is_averaged_as_ever(kind: Any, number: int) -> None:
    choice, left_out = CHOICES[number]
    model, other = conv_net(), conv_net()
    averaged, whole = make(kind, model, **choice), make(kind, other)
    run(averaged, model, 4)
    run(whole, other, 4)
    expect_shared(averaged, model, left_out)
    ours, theirs = snapshot(averaged.module), snapshot(whole.module)
    assert set(differences(ours, theirs)) == left_out
    assert set(averaged.avg_parameters) == set(whole.avg_parameters) - left_out
    assert set(averaged.weights if kind is AveragedWeights else ours) == set(theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"interval": 2},
        {"every": 2},
        {"begin_step": 3},
        {"rounding": "stochastic", "averaged_dtype": torch.bfloat16},
        {"distance_every": 1},
        {"offload": "cpu"},
        {"capturable": True},
        {"backend": "foreach"},
        {"update_buffers": True},
    ],
    ids=str,
)
def test_other_options_go_with_it(kind: Any, options: dict[str, Any]) -> None:
    model, other = conv_net(), conv_net()
    averaged, whole = make(kind, model, exclude="head", **options), make(kind, other, **options)
    run(averaged, model, 5)
    run(whole, other, 5)
    ours, theirs = snapshot(averaged.module), snapshot(whole.module)
    assert set(differences(ours, theirs)) - HEAD == set()
    if options.get("every", 1) == 1:
        dtype = ours["head.weight"].dtype
        assert torch.equal(ours["head.weight"], model.head.weight.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_the_plain_model(kind: Any) -> None:
    plain = conv_net()
    wrapped = nn.DataParallel(plain)
    wrapped.module.hidden = torch.compile(plain.hidden)
    averaged = make(kind, wrapped, include=r"^(conv|hidden)\.weight$")
    run(averaged, wrapped, 3)
    assert str(averaged).count("left_out=5: conv.bias, norm.weight") == 1
    weights = {name.replace("module.", ""): one for name, one in parameters(averaged).items()}
    assert torch.equal(weights["conv.bias"], plain.conv.bias)
    assert not torch.equal(weights["conv.weight"], plain.conv.weight)
    # The wrappers come and go; whether tensors are left out doesn't.
    plain.hidden = plain.hidden._orig_mod
    run(averaged, plain, 1)
    assert torch.equal(dict(averaged.module.named_parameters()).popitem()[1], plain.head.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update_buffers", [False, "running"])
def test_wrappers_that_hide_in_states_and_names(kind: Any, update_buffers: Any) -> None:
    model = conv_net()
    model.head = checkpoint_wrapper(model.head)
    averaged = make(kind, model, exclude="head", share_frozen=True, update_buffers=update_buffers)
    model.conv.requires_grad_(False)
    run(averaged, model, 2)
    averages = {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "hidden.weight"}
    statistics = {"norm.running_mean", "norm.running_var"} if update_buffers else set()
    assert set(averaged.avg_parameters) == averages | statistics
    assert not any("head" in name for name in averaged_state_dict(averaged, model))
    fresh = make(kind, model, exclude="head", share_frozen=True, update_buffers=update_buffers)
    fresh.load_state_dict(make_state_without(averaged, "head"))
    for one in (averaged, fresh):
        weights = one.module.state_dict()
        assert weights["head.weight"].data_ptr() == model.head.weight.data_ptr()
    assert differences(own(averaged), own(fresh)) == []


def make_state_without(averaged: Any, part: str) -> dict[str, Tensor]:
    state = averaged.state_dict()
    return {name: tensor for name, tensor in state.items() if part not in name}


def _none(name: str, tensor: Tensor) -> bool:
    """Chooses nothing."""
    return False


@pytest.mark.parametrize(
    ("choice", "kind", "message"),
    [
        ({"exclude": "haed"}, ValueError, "exclude: 'haed' is found.*like it are: head.bias, h"),
        ({"include": r"^conv2\."}, ValueError, "no parameter; names like it are: conv.bias"),
        ({"include": ["conv", "fc"]}, ValueError, "include: 'fc' is found"),
        ({"exclude": "running_mean"}, ValueError, "but of buffers: norm.running_mean. Buffers"),
        ({"exclude": ""}, ValueError, "exclude='' leaves out every parameter"),
        ({"include": "head", "exclude": "head"}, ValueError, "'head' with exclude='head' leaves"),
        ({"include": _none}, ValueError, "leaves out every parameter"),
        ({"include": "("}, ValueError, "is no regular expression"),
        ({"include": []}, TypeError, r"include is \[\]; a regular expression, a list"),
        ({"exclude": 3}, TypeError, "exclude is 3; a regular expression"),
        ({"exclude": [b"head"]}, TypeError, "is no pattern"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_a_choice_that_cant_be_meant_raises(
    choice: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for averaged in KINDS:
        with pytest.raises(kind, match=message):
            averaged(conv_net(), **choice)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_are_left_out_together(kind: Any) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied, self.last = Tied(), nn.Linear(4, 2)

    for choice in ({"exclude": "decoder"}, {"include": "encoder|last"}):
        with pytest.raises(ValueError, match=r"decoder.weight' and 'tied.encoder.weight' are one"):
            kind(Three(), **choice)
    model = Three()
    averaged = make(kind, model, exclude="coder")
    run(averaged, model, 2)
    model.double()  # shared anew
    run(averaged, model, 1)
    tied = averaged.module.tied
    assert tied.encoder.weight is tied.decoder.weight
    assert tied.encoder.weight.data_ptr() == model.tied.encoder.weight.data_ptr()


def test_a_copy_that_is_called_has_the_present_weights() -> None:
    model = conv_net().eval()
    averaged = make(ExponentialMovingAverage, model, exclude="head")
    run(averaged, model, 2)
    images = torch.randn(2, 1, 5, 5)
    before = averaged(images)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    assert torch.allclose(averaged(images), before + model.scale)


def test_a_backward_pass_through_weights_that_were_trained_since_is_refused() -> None:
    model = conv_net().eval()
    averaged = make(ExponentialMovingAverage, model, exclude="head")
    images = torch.randn(2, 1, 5, 5, requires_grad=True)
    averaged(images).sum().backward()
    for _ in range(2):
        loss = averaged(images).sum()
        torch.optim.SGD([model.head.weight], lr=0.1).step()
        loss.backward()  # no gradient, so nothing was written
        loss = averaged(images).sum()
        model.head.weight.grad = torch.ones_like(model.head.weight)
        torch.optim.SGD([model.head.weight], lr=0.1).step()
        model.head.weight.grad = None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.double()  # the shared weights are others then
        model.float()
        run(averaged, model, 1)


def test_a_copy_in_another_dtype_has_copies_of_its_own() -> None:
    model = conv_net()
    averaged = make(ExponentialMovingAverage, model, exclude="head", averaged_dtype=torch.float64)
    for _ in range(2):
        run(averaged, model, 2)
        weight = averaged.module.head.weight
        assert weight.dtype == torch.float64
        assert torch.equal(weight, model.head.weight.double())
    assert averaged.shared_names == set() and set(averaged.left_out_names) == HEAD
    # In tensors that nobody calls it needs none.
    weights = make(AveragedWeights, model, exclude="head", averaged_dtype=torch.float64)
    expect_shared(weights, model, HEAD)
    assert weights.weights["head.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_to_the_average_stays_with_it(kind: Any) -> None:
    model = conv_net()
    averaged = make(kind, model, exclude="head")
    run(averaged, model, 2)
    before = model.head.weight.clone()
    with torch.no_grad():
        averaged.module.head.weight.fill_(7.0)
    assert torch.equal(model.head.weight, before)
    averaged.update_parameters(model)
    expect_shared(averaged, model, HEAD)


@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_a_model_that_gets_other_memory(kind: Any) -> None:
    model = conv_net()
    averaged = make(kind, model, exclude="head")
    run(averaged, model, 2)
    model.double()
    run(averaged, model, 1)
    expect_shared(averaged, model, HEAD)
    assert averaged.module.head.weight.dtype == torch.float64
    model.head = copy.deepcopy(model.head)
    run(averaged, model, 1)
    expect_shared(averaged, model, HEAD)
    model.head.weight.data = model.head.weight.data.clone()
    with averaged.swapped(model):  # before an update too
        expect_shared(averaged, model, HEAD)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_or_not_it_stays_left_out(kind: Any) -> None:
    model = conv_net()
    model.conv.requires_grad_(False)
    model.head.requires_grad_(False)
    averaged = make(kind, model, exclude="head", share_frozen=True)
    run(averaged, model, 2)
    assert averaged.shared_names == HEAD | {"conv.weight", "conv.bias"}
    model.requires_grad_(True)
    run(averaged, model, 2)
    expect_shared(averaged, model, HEAD)
    assert not torch.equal(averaged.module.conv.weight, model.conv.weight)
    model.head.requires_grad_(False)
    run(averaged, model, 2)
    expect_shared(averaged, model, HEAD)


def test_lazy_layers_are_asked_about_when_they_have_shapes() -> None:
    def has_many_rows(name: str, tensor: Tensor) -> bool:
        return len(tensor) > 3

    for kind in KINDS:
        model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2))
        averaged = make(kind, model, exclude=has_many_rows)
        model(torch.ones(2, 4))
        run(averaged, model, 2)
        expect_shared(averaged, model, {"0.weight", "0.bias"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_on_meta(kind: Any) -> None:
    with torch.device("meta"):
        model = ConvNet()
    averaged = make(kind, model, exclude="head")
    model.to_empty(device="cpu").load_state_dict(conv_net().state_dict())
    run(averaged, model, 2)
    expect_shared(averaged, model, HEAD)


def test_a_momentum_by_name_counts_for_the_others() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, {"conv": 0.5, "norm|hidden": 0.1}, exclude="head")
    run(averaged, model, 3)
    expect_shared(averaged, model, HEAD)
    with pytest.raises(ValueError, match="'head' counts for no averaged tensor"):
        ExponentialMovingAverage(model, {"head": 0.5, "": 0.1}, exclude="head")


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_a_class_of_their_own(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].weight = nn.Parameter(Wrapped(torch.ones(3, 3)))
    averaged = make(kind, model, include="^1")
    for value in (2.0, 3.0):
        model[0].weight.data.inside.fill_(value)
        averaged.update_parameters(model)
        assert dict(averaged.module.named_parameters())["0.weight"].inside.eq(value).all()
    assert model[0].weight.requires_grad


def test_an_infinite_weight_that_is_left_out_stops_nothing() -> None:
    model = conv_net()
    averaged = make(AveragedWeights, model, exclude="head", skip_nonfinite=True)
    with torch.no_grad():
        model.head.bias.fill_(torch.inf)
    averaged.update_parameters(model)
    assert averaged.steps == 1
    with torch.no_grad():
        model.conv.bias.fill_(torch.inf)
    averaged.update_parameters(model)
    assert averaged.steps == 1


def test_attached_to_an_optimizer() -> None:
    model = conv_net()
    averaged = make(AveragedWeights, model, exclude="head")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, averaged):
        for _ in range(3):
            model(torch.randn(4, 1, 5, 5)).square().sum().backward()
            optimizer.step()
    assert averaged.steps == 3
    expect_shared(averaged, model, HEAD)
    assert not torch.equal(averaged.module.hidden.weight, model.hidden.weight)
