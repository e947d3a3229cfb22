"""``momentum_update()``: the target network of BYOL and MoCo v3, beside the expression it replaces.

``target * momentum + online * (1. - momentum)``, tensor by tensor.
"""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused.hooks import momentum_update as module
from ema_fused.hooks.momentum_update import momentum_update
from ema_fused.modules import pairing
from tests.networks import (
    CPU_BACKENDS,
    ConvNet,
    Tied,
    conv_net,
    differences,
    generator,
    snapshot,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=CPU_BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best for each tensor, and the one that needs nothing compiled."""
    if request.param is not None:
        monkeypatch.setenv("EMA_FUSED_BACKEND", request.param)


def networks(dtype: torch.dtype = torch.float32) -> tuple[ConvNet, ConvNet]:
    """(target, online): the former needs no gradient."""
    return conv_net(0, dtype).requires_grad_(False), conv_net(1, dtype)


def by_hand(target: nn.Module, online: nn.Module, momentum: float) -> dict[str, Tensor]:
    """The target's parameters after an update."""
    others = dict(online.named_parameters())
    return {
        name: parameter.data * momentum + others[name].data * (1.0 - momentum)
        for name, parameter in target.named_parameters()
    }


def parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def replace_storage(network: nn.Module) -> None:
    """What MMSelfSup's own update does to the target at every step."""
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


# The same to the bit.


@pytest.mark.parametrize("replaced", ["nothing", "target", "online", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fifty_updates_are_equal_to_the_bit(dtype: torch.dtype, replaced: str) -> None:
    target, online = networks(dtype)
    random = generator()
    held = []  # so that new storage is never where the old one was
    for step in range(50):
        train(online, random)
        momentum = 1 - 0.004 * (math.cos(math.pi * step / 50) + 1) / 2
        expected = by_hand(target, online, momentum)
        momentum_update(target, online, momentum)
        assert differences(parameters(target), expected) == [], f"after update {step}"
        held += [parameter.data for parameter in (*target.parameters(), *online.parameters())]
        for network, name in ((target, "target"), (online, "online")):
            if replaced in (name, "both"):
                replace_storage(network)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.75, 0.99, 0.996, 0.999999, 1.0, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momenta_from_a_half_up_are_equal_to_the_bit(dtype: torch.dtype, momentum: float) -> None:
    target, online = networks(dtype)
    expected = by_hand(target, online, momentum)
    momentum_update(target, online, momentum)
    assert differences(parameters(target), expected) == []


@pytest.mark.parametrize("momentum", [1e-9, 0.1, 0.3, 0.49])
def test_momenta_below_a_half_are_within_a_rounding(momentum: float) -> None:
    """1 - (1 - momentum) isn't momentum there; nobody has a target that forgets so fast."""
    for dtype in (torch.float32, torch.float64):
        target, online = networks(dtype)
        expected = by_hand(target, online, momentum)
        momentum_update(target, online, momentum)
        for name, found in parameters(target).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-16)


def test_buffers_are_left_alone() -> None:
    target, online = networks()
    train(online, generator())
    buffers = {name: buffer.clone() for name, buffer in target.named_buffers()}
    momentum_update(target, online, 0.5)
    assert differences(dict(target.named_buffers()), buffers) == []
    assert online.norm.num_batches_tracked == 1


def test_buffers_may_differ() -> None:
    target, online = networks()
    online.register_buffer("queue", torch.zeros(3))
    target.norm.register_buffer("running_mean", torch.zeros(9))
    expected = by_hand(target, online, 0.5)
    momentum_update(target, online, 0.5)
    assert differences(parameters(target), expected) == []


def test_tied_weights_are_updated_once() -> None:
    target, online = Tied(), Tied()
    with torch.no_grad():
        target.encoder.weight.fill_(0.0)
        online.encoder.weight.fill_(1.0)
    momentum_update(target, online, 0.75)
    assert target.decoder.weight.unique().tolist() == [0.25]


def test_no_gradient_is_recorded_and_none_is_touched() -> None:
    target, online = networks()
    online(torch.ones(2, 1, 5, 5)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in online.parameters()]
    momentum_update(target, online, 0.5)
    assert all(parameter.is_leaf and parameter.grad is None for parameter in target.parameters())
    after = [parameter.grad for parameter in online.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))


# Following the networks.


def count_pairings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made = []
    real = pairing.pair_up

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(pairing, "pair_up", counted)
    return made


def test_two_networks_are_paired_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_pairings(monkeypatch)
    target, online = networks()
    for _ in range(5):
        momentum_update(target, online, 0.9)
        replace_storage(target)
    assert len(made) == 1


def test_new_parameters_are_followed() -> None:
    target, online = networks()
    momentum_update(target, online, 0.9)
    for network in (target, online):
        weight = torch.randn(67, 5, generator=generator())
        network.hidden.weight = nn.Parameter(weight, requires_grad=network is online)
        expected = by_hand(target, online, 0.9)
        momentum_update(target, online, 0.9)
        assert differences(parameters(target), expected) == []


def test_converted_networks_are_followed() -> None:
    target, online = networks()
    momentum_update(target, online, 0.9)
    target.double()
    online.double()
    expected = by_hand(target, online, 0.9)
    momentum_update(target, online, 0.9)
    assert differences(parameters(target), expected) == []


def test_several_pairs_of_networks_keep_apart() -> None:
    pairs = [networks() for _ in range(3)]
    crossed = [*pairs, (pairs[0][0], pairs[1][1])]
    for _ in range(2):
        for target, online in crossed:
            expected = by_hand(target, online, 0.75)
            momentum_update(target, online, 0.75)
            assert differences(parameters(target), expected) == []


@pytest.mark.parametrize("first_gone", ["target", "online"])
def test_nothing_is_kept_of_networks_that_are_gone(first_gone: str) -> None:
    gc.collect()
    before = dict(module._pairings)
    target, online = networks()
    momentum_update(target, online, 0.9)
    replace_storage(target)
    momentum_update(target, online, 0.9)
    target.extra = nn.Parameter(torch.zeros(1), requires_grad=False)
    online.extra = nn.Parameter(torch.zeros(1))
    momentum_update(target, online, 0.9)  # paired anew, in the old one's place
    assert len(module._pairings) == len(before) + 1
    gone = {
        "target": [weakref.ref(target), weakref.ref(target.head.weight)],
        "online": [weakref.ref(online), weakref.ref(online.head.weight)],
    }
    if first_gone == "target":
        del target
    else:
        del online
    gc.collect()
    assert module._pairings == before
    assert all(reference() is None for reference in gone[first_gone])


def test_networks_in_a_module_of_both_are_freed_with_it() -> None:
    algorithm = nn.Module()
    algorithm.target_net, algorithm.online_net = networks()
    momentum_update(algorithm.target_net, algorithm.online_net, 0.9)
    gone = [weakref.ref(part) for part in (*algorithm.modules(), *algorithm.parameters())]
    del algorithm
    gc.collect()
    assert [reference() for reference in gone if reference() is not None] == []


# What is refused, and changes nothing.


@pytest.mark.parametrize("momentum", [-0.1, 1.5, math.nan, math.inf])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    target, online = networks()
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"momentum is .*; a number in \[0, 1\] is expected"):
        momentum_update(target, online, momentum)
    assert differences(snapshot(target), before) == []


def test_networks_of_another_structure_are_refused_with_their_names() -> None:
    target, online = networks()
    del online.head
    online.classifier = nn.Linear(67, 31)
    before = snapshot(target)
    for _ in range(2):
        with pytest.raises(KeyError) as caught:
            momentum_update(target, online, 0.9)
        for name in ("head.weight", "head.bias", "classifier.weight", "classifier.bias"):
            assert name in str(caught.value)
    assert differences(snapshot(target), before) == []


def test_a_structure_that_changes_later_is_refused() -> None:
    target, online = networks()
    momentum_update(target, online, 0.9)
    before = snapshot(target)
    online.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match="extra"):
        momentum_update(target, online, 0.9)
    assert differences(snapshot(target), before) == []
    del online.extra
    momentum_update(target, online, 0.9)
    assert "conv.weight" in differences(snapshot(target), before)


def test_another_shape_is_refused() -> None:
    target, online = networks()
    online.head = nn.Linear(67, 30)
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"'head\.weight' has shape \(31, 67\) .* \(30, 67\)"):
        momentum_update(target, online, 0.9)
    assert differences(snapshot(target), before) == []


def test_another_kind_of_number_is_refused() -> None:
    target, online = networks()
    online.head.weight = nn.Parameter(torch.ones(31, 67, dtype=torch.int64), requires_grad=False)
    before = snapshot(target)
    with pytest.raises(TypeError, match=r"'head\.weight' is torch\.float32 .* torch\.int64"):
        momentum_update(target, online, 0.9)
    assert differences(snapshot(target), before) == []


def test_trainable_parameters_of_both_networks_are_refused() -> None:
    target, online = networks()
    target.head.weight = online.head.weight
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"'head\.weight' of the average is the model's own mem"):
        momentum_update(target, online, 0.9)
    assert differences(snapshot(target), before) == []


def test_frozen_parameters_of_both_networks_are_left_alone() -> None:
    """A patch embedding that isn't trained, say: the average of its values is its value."""
    target, online = networks()
    target.head.weight = online.head.weight.requires_grad_(False)
    expected = by_hand(target, online, 0.75)
    expected["head.weight"] = online.head.weight.detach().clone()
    momentum_update(target, online, 0.75)
    assert differences(parameters(target), expected) == []
