"""ema-pytorch's EMA beside ours: the same to the bit, but for what is better."""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tests.frameworks.adapters.adapter_cases import DTYPES, assert_freed, no_value_asked_of
from tests.networks import Cached, Tied, conv_net, differences, generator, snapshot, train

theirs = pytest.importorskip("ema_pytorch", reason="ema-pytorch is not installed")

from ema_fused.adapters import ema_pytorch as ours  # noqa: E402

# Updates from the start, so that a hundred steps average a hundred times.
SOON = {"update_after_step": 0, "update_every": 1}

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "soon": SOON,
    "beta": {**SOON, "beta": 0.3},
    "frozen": {**SOON, "beta": 1.0},
    "late and seldom": {"update_after_step": 20, "update_every": 7},
    "the step from copies to averages": {
        "update_after_step": 6,
        "update_every": 1,
        "update_model_with_ema_every": 3,
        "ignore_names": {"head.bias"},
    },
    "schedule": {**SOON, "inv_gamma": 3.0, "power": 0.5, "min_value": 0.2, "beta": 0.9},
    "fraction": {"update_after_step": 2.5, "update_every": 1},
    "copied": {**SOON, "param_or_buffer_names_no_ema": {"conv.weight", "norm.running_mean"}},
    "copied list": {**SOON, "param_or_buffer_names_no_ema": ["scale"]},
    "ignored": {**SOON, "ignore_names": {"head.bias", "norm.running_var"}},
    "ignored prefixes": {**SOON, "ignore_startswith_names": {"conv", "norm.running"}},
    "devices": {**SOON, "allow_different_devices": True},
    "foreach": {**SOON, "use_foreach": True, "allow_different_devices": True},
    "coerced": {**SOON, "coerce_dtype": True},
    "coerced foreach": {**SOON, "coerce_dtype": True, "use_foreach": True},
    "moved": {**SOON, "move_ema_to_online_device": True},
    "lazy": {**SOON, "lazy_init_ema": True},
    "without model": {**SOON, "include_online_model": False},
    "back": {**SOON, "update_model_with_ema_every": 5},
    "back in part": {
        **SOON,
        "update_model_with_ema_every": 3,
        "update_model_with_ema_beta": 0.7,
        "ignore_names": {"head.bias"},
        "param_or_buffer_names_no_ema": {"conv.weight"},
    },
}


def both(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """With a model of its own each: an EMA may write its model."""
    return ours.EMA(model, **options), theirs.EMA(copy.deepcopy(model), **options)


def assert_equal_for(steps: int, our: Any, their: Any, seed: int = 0) -> None:
    ours_random, theirs_random = generator(seed), generator(seed)
    for step in range(steps):
        for ema, random in ((our, ours_random), (their, theirs_random)):
            train(ema.model, random)
            ema.update()
        assert differences(snapshot(our), snapshot(their)) == [], f"after call {step}"
        assert differences(snapshot(our.model), snapshot(their.model)) == []
        assert our.get_current_decay() == their.get_current_decay()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_hundred_and_fifty_steps_are_equal_to_the_bit(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    our, their = both(conv_net(dtype=dtype), **options)
    assert_equal_for(150, our, their)
    assert list(our.state_dict()) == list(their.state_dict())
    assert our.step == 150


def test_the_decay_has_the_originals_rounding() -> None:
    """In float32, so that 0.9999 isn't quite itself."""
    our, their = both(nn.Linear(1, 1))
    for step in [*range(0, 3000, 37), 10**5, 10**6, 10**7, 10**8]:
        for ema in (our, their):
            ema.step.fill_(step)
        assert our.get_current_decay() == their.get_current_decay()
    assert our.get_current_decay() == 0.9998999834060669


def test_checkpoints_continue_both_ways() -> None:
    our, their = both(conv_net(), **SOON)
    assert_equal_for(20, our, their)
    our_next, their_next = both(conv_net(seed=1), **SOON)
    our_next.update()  # what it knows of its buffers is overwritten
    our_next.load_state_dict(their.state_dict())
    their_next.load_state_dict(our.state_dict())
    assert_equal_for(20, our_next, their_next, seed=1)
    assert our_next.step == 40


def test_the_rest_is_theirs() -> None:
    our, their = both(conv_net(), forward_method_names=("extra_repr",), **SOON)
    assert_equal_for(5, our, their)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(our.forward_eval(images), their.forward_eval(images))
    assert our.extra_repr() == our.ema_model.extra_repr()
    assert our.eval() is our.ema_model
    assert torch.equal(our(images), their.ema_model.eval()(images))
    for ema in (our, their):
        ema.ema_model.train()
        ema.update_model_with_ema(0.5)
        ema.copy_params_from_model_to_ema()
    assert_equal_for(5, our, their)
    assert type(ours.EMA([torch.zeros(1)])) is type(theirs.EMA([torch.zeros(1)]))


def test_it_updates_behind_an_optimizers_step() -> None:
    our, their = both(nn.Linear(2, 2), **SOON)
    for ema in (our, their):
        optimizer = torch.optim.SGD(ema.model.parameters(), 0.1)
        ema.add_to_optimizer_post_step_hook(optimizer)
        for _ in range(5):
            ema.model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert our.step == 5
    assert differences(snapshot(our), snapshot(their)) == []


def test_an_ema_model_may_be_given() -> None:
    model = conv_net()
    our = ours.EMA(model, ema_model=lambda: conv_net(seed=1), **SOON)
    their = theirs.EMA(copy.deepcopy(model), ema_model=conv_net(seed=1), **SOON)
    assert_equal_for(5, our, their)


def test_options_dtypes_and_tensors_that_change_are_followed() -> None:
    our, their = both(conv_net(), **SOON)
    assert_equal_for(4, our, their)
    changes: list[dict[str, Any]] = [
        {"ignore_names": {"conv.bias"}},
        {"ignore_startswith_names": {"head"}},
        {"param_or_buffer_names_no_ema": {"scale"}},
        {"update_every": 2, "beta": 0.5},
    ]
    for change in changes:
        for ema in (our, their):
            vars(ema).update(change)
        assert_equal_for(4, our, their)
    for ema in (our, their):
        ema.double()
    assert_equal_for(4, our, their)
    for ema in (our, their):
        ema.model.conv.weight = nn.Parameter(torch.ones_like(ema.model.conv.weight))
        ema.ema_model.hidden.weight.data = torch.zeros_like(ema.ema_model.hidden.weight)
    assert_equal_for(4, our, their)
    for ema in (our, their):
        ema.step.fill_(0)
        ema.initted.fill_(False)
    assert_equal_for(4, our, their)
    assert our.step == 4


def test_no_tensor_is_asked_for_its_value_where_theirs_is() -> None:
    our, their = both(
        conv_net(), update_model_with_ema_every=2, update_model_with_ema_beta=0.5, **SOON
    )
    for _ in range(3):
        our.update()
    with no_value_asked_of(our, their):
        for _ in range(3):
            our.update()
        with pytest.raises(AssertionError, match="asked for its value"):
            their.update()
    assert our.step == 6


def test_nothing_is_kept_alive() -> None:
    def delete() -> weakref.ref[Any]:
        ema = ours.EMA(nn.Linear(2, 2), **SOON)
        for _ in range(3):
            ema.update()
        return weakref.ref(ema.model.weight)

    assert_freed(delete)


@pytest.mark.parametrize(
    ("replace", "error", "message"),
    [
        (lambda m: m.__delattr__("bias"), KeyError, "missing from the model: bias"),
        (lambda m: m.append_parameter(), KeyError, "unexpected in the model: another"),
        (lambda m: setattr(m, "weight", nn.Parameter(torch.ones(3, 3))), ValueError, "'weight'"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_what_does_not_match_raises_with_nothing_done(
    replace: Any, error: type[Exception], message: str
) -> None:
    class Layer(nn.Linear):
        def append_parameter(self) -> None:
            self.another = nn.Parameter(torch.ones(1))

    our = ours.EMA(Layer(2, 2), **SOON)
    for _ in range(3):
        our.update()
    replace(our.model)
    before = snapshot(our)
    with pytest.raises(error, match=message):
        our.update()
    assert differences(snapshot(our), before) == []
    assert our.step == 3


# What is different on purpose: first the original's behaviour, then ours.


def test_a_wrapped_model_is_the_same_model_where_theirs_averages_nothing() -> None:
    model = conv_net()
    our, their = both(model, include_online_model=False, **SOON)
    random = generator()
    for ema in (our, their):
        for _ in range(2):
            ema.update()
        ema.online_model = [nn.DataParallel(model)]
    train(model, random)
    before = snapshot(our.ema_model)
    for ema in (our, their):
        ema.update()
    assert differences(snapshot(their.ema_model), before) == []
    expected = torch.lerp(
        before["conv.weight"], model.conv.weight.detach(), 1.0 - our.get_current_decay()
    )
    assert torch.equal(our.ema_model.conv.weight, expected)


def test_dtypes_may_differ_where_theirs_raises_or_rounds_first() -> None:
    our, their = both(nn.Linear(20, 20), **SOON)
    _, coercing = both(our.model, coerce_dtype=True, **SOON)
    for ema in (our, their, coercing):
        for _ in range(2):
            ema.update()
        ema.ema_model.bfloat16()
    random = generator()
    train(our.model, random)
    for ema in (their, coercing):
        ema.model.load_state_dict(our.model.state_dict())
    before = our.ema_model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="dtype"):
        their.update()
    our.update()
    coercing.update()
    weight = 1.0 - our.get_current_decay()
    exact = torch.lerp(before.float(), our.model.weight, weight)
    assert torch.equal(our.ema_model.weight, exact.bfloat16())
    assert not torch.equal(coercing.ema_model.weight, our.ema_model.weight)
    torch.testing.assert_close(
        coercing.ema_model.weight, our.ema_model.weight, rtol=2**-7, atol=1e-3
    )


def test_a_float32_average_of_a_bfloat16_model_is_as_theirs_with_coerce_dtype() -> None:
    our, their = both(conv_net(dtype=torch.bfloat16), coerce_dtype=True, **SOON)
    for ema in (our, their):
        ema.ema_model.float()
    assert_equal_for(20, our, their)


def test_tensors_pair_by_name_where_theirs_pair_by_order() -> None:
    class Two(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.full((1,), float(ord(name)))))

    our, their = (kind.EMA(Two("ba"), ema_model=Two("ab"), **SOON) for kind in (ours, theirs))
    for ema in (our, their):
        ema.update_moving_average(ema.ema_model, ema.model, 0.0)
    assert their.ema_model.a.item() == ord("b")
    assert our.ema_model.a.item() == ord("a")


def test_tied_weights_and_non_persistent_buffers_are_as_theirs() -> None:
    assert_equal_for(5, *both(Tied(), **SOON))
    assert_equal_for(5, *both(Cached(), **SOON))


def test_without_ema_pytorch_the_error_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "ema_fused.adapters.ema_pytorch")
    monkeypatch.setitem(sys.modules, "ema_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'ema_fused\[ema_pytorch\]'"):
        import ema_fused.adapters.ema_pytorch  # noqa: F401
