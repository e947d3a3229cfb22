"""timm's averages beside ours: the same to the bit, but for what is random or better."""

from __future__ import annotations

import copy
import pickle
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tests.frameworks.adapters.adapter_cases import (
    DTYPES,
    SLOW,
    assert_freed,
    in_place,
    no_value_asked_of,
    timm_originals,
    without_integers,
)
from tests.networks import Cached, Tied, conv_net, differences, generator, snapshot, train

try:
    theirs = timm_originals()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

from ema_fused.adapters import timm as ours

V3 = {
    "plain": {"decay": 0.97},
    "low decay": {"decay": 0.3},
    "warmup": {"decay": 0.97, "use_warmup": True},
    "warmup options": {
        "decay": 0.9,
        "use_warmup": True,
        "warmup_gamma": 3.0,
        "warmup_power": 0.5,
        "min_decay": 0.2,
        "update_after_step": 7,
    },
    "one by one": {"decay": 0.97, "foreach": False},
    "no buffers": {"decay": 0.97, "exclude_buffers": True},
}


def both(kind: str, model: nn.Module, **arguments: Any) -> tuple[Any, Any]:
    return getattr(ours, kind)(model, **arguments), getattr(theirs, kind)(model, **arguments)


def assert_equal_for(
    steps: int, model: nn.Module, our: Any, their: Any, *, seed: int = 0, counted: bool = False
) -> None:
    random = generator(seed)
    for step in range(steps):
        train(model, random)
        for averaged in (our, their):
            averaged.update(model, **({"step": step} if counted else {}))
        assert differences(snapshot(our), snapshot(their)) == [], f"after call {step}"


@pytest.mark.parametrize(
    ("dtype", "decay"),
    # In float64 the weights themselves may differ in their last bit with a decay below 0.5.
    [(torch.float32, 0.3), *((dtype, decay) for dtype in DTYPES for decay in (0.9998, 0.97))],
    ids=str,
)
def test_a_hundred_steps_of_v2_are_equal_to_the_bit(dtype: torch.dtype, decay: float) -> None:
    model = without_integers(dtype)
    assert_equal_for(100, model, *both("ModelEmaV2", model, decay=decay))


@SLOW
@pytest.mark.parametrize("counted", [False, True], ids=["without steps", "with steps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", V3.values(), ids=V3)
def test_a_hundred_steps_of_v3_are_equal_to_the_bit(
    arguments: dict[str, Any], dtype: torch.dtype, counted: bool
) -> None:
    model = conv_net(dtype=dtype)
    our, their = both("ModelEmaV3", model, stochastic_rounding=False, **arguments)
    assert_equal_for(100, model, our, their, counted=counted)


@SLOW
@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
@pytest.mark.parametrize("exclude_buffers", [False, True], ids=["buffers too", "parameters"])
def test_a_float32_average_of_a_bfloat16_model_is_equal_to_the_bit(
    exclude_buffers: bool, foreach: bool
) -> None:
    model = conv_net(dtype=torch.bfloat16)
    arguments = {"foreach": foreach, "exclude_buffers": exclude_buffers, "decay": 0.9}
    our, their = both("ModelEmaV3", model, dtype=torch.float32, **arguments)
    assert our.module.conv.weight.dtype == torch.float32
    assert_equal_for(100, model, our, their)


@SLOW
@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_a_float32_average_of_a_float64_model_is_as_exact(foreach: bool) -> None:
    model = conv_net(dtype=torch.float64)
    our, their = both("ModelEmaV3", model, dtype=torch.float32, foreach=foreach, decay=0.9)
    random = generator()
    for _ in range(100):
        our.load_state_dict(their.state_dict())
        train(model, random)
        for averaged in (our, their):
            averaged.update(model)
        found = our.state_dict()
        for name, tensor in their.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@SLOW
def test_options_and_dtypes_that_change_are_followed() -> None:
    model = conv_net()
    our, their = both("ModelEmaV3", model, decay=0.9)
    assert_equal_for(3, model, our, their)
    model.bfloat16()
    assert_equal_for(3, model, our, their)
    for change in ({"foreach": False}, {"exclude_buffers": True}, {"decay": 0.8}):
        for averaged in (our, their):
            vars(averaged).update(change)
        assert_equal_for(3, model, our, their)
    model.double()
    for averaged in (our, their):
        averaged.double()
    assert_equal_for(3, model, our, their)
    model.conv.weight = nn.Parameter(torch.ones_like(model.conv.weight))
    assert_equal_for(3, model, our, their)


def test_a_model_without_buffers_that_is_converted_is_followed() -> None:
    """In place, then: no tensor becomes another object."""
    model = nn.Linear(20, 20)
    our, their = both("ModelEmaV3", model, decay=0.9)
    assert_equal_for(3, model, our, their)
    model.bfloat16()
    assert_equal_for(20, model, our, their)


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_checkpoints_continue_both_ways(kind: str) -> None:
    model = without_integers()
    our, their = both(kind, model, decay=0.9)
    assert list(our.state_dict()) == list(their.state_dict())
    assert_equal_for(20, model, our, their)
    our_next, their_next = both(kind, without_integers(), decay=0.9)
    our_next.load_state_dict(their.state_dict())
    their_next.load_state_dict(our.state_dict())
    assert_equal_for(20, model, our_next, their_next, seed=1)


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_set_forward_and_training_mode_are_theirs(kind: str) -> None:
    model = without_integers()
    our, their = both(kind, model, decay=0.9)
    train(model, generator())
    for averaged in (our, their):
        averaged.set(model)
        assert not averaged.module.training
    assert differences(snapshot(our), snapshot(their)) == []
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(our(images), their(images))
    assert_equal_for(3, model, our, their)


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_a_device_may_be_given(kind: str) -> None:
    model = without_integers()
    assert_equal_for(5, model, *both(kind, model, decay=0.9, device=torch.device("cpu")))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_wrapped_and_scripted_models_are_the_same_model(kind: str) -> None:
    model = without_integers()
    our, their = both(kind, model, decay=0.9)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert_equal_for(5, wrapped, our, their)  # type: ignore[arg-type]
    scripted = torch.jit.script(nn.Linear(3, 2))
    assert_equal_for(5, scripted, *both(kind, scripted, decay=0.9))


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_copies_and_pickles_go_on_equally(kind: str) -> None:
    model = without_integers()
    our, their = both(kind, model, decay=0.9)
    assert_equal_for(2, model, our, their)
    with in_place("timm.utils.model_ema", theirs):
        pickled = pickle.loads(pickle.dumps(our))
    for made in (copy.deepcopy(our), pickled):
        assert_equal_for(5, copy.deepcopy(model), made, copy.deepcopy(their))


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_no_tensor_is_asked_for_its_value(kind: str) -> None:
    model = conv_net()
    our = getattr(ours, kind)(model)
    our.update(model)
    with no_value_asked_of():
        our.update(model)


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_a_deleted_model_is_freed(kind: str) -> None:
    averaged = getattr(ours, kind)(nn.Linear(2, 2))

    def delete() -> weakref.ref[Any]:
        model = nn.Linear(2, 2)
        averaged.update(model)
        return weakref.ref(model.weight)

    assert_freed(delete)
    averaged.update(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (nn.Linear(2, 3, bias=False), KeyError, "missing from the model: bias"),
        (nn.Linear(3, 2), ValueError, "'weight' has shape"),
    ],
    ids=["name", "shape"],
)
@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_what_does_not_match_raises_with_nothing_done(
    kind: str, other: nn.Module, error: type[Exception], message: str
) -> None:
    our = getattr(ours, kind)(nn.Linear(2, 2))
    before = snapshot(our)
    with pytest.raises(error, match=message):
        our.update(other)
    assert differences(snapshot(our), before) == []


# Stochastic rounding: the same probabilities, other bits.


def ones(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """Bits of its own for each of many equal elements."""
    model = nn.Linear(128, 256, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    return model


def moved(averaged: Any, model: nn.Linear, steps: int = 60) -> Any:
    """The average of 1.0 after steps towards 1.25, each far below bfloat16's resolution."""
    with torch.no_grad():
        model.weight.fill_(1.25)
    for _ in range(steps):
        averaged.update(model)
    return averaged.module.weight.detach().float()


def test_stochastic_rounding_is_right_in_the_mean_as_theirs_is() -> None:
    exact = 1.25 - 0.25 * 0.999**60
    spreads = []
    for kind in (ours, theirs):
        model = ones()
        found = moved(kind.ModelEmaV3(model, decay=0.999), model)
        # A few standard errors: one number has a standard deviation of about 0.01.
        assert found.mean().item() == pytest.approx(exact, abs=4 * 0.01 / found.numel() ** 0.5)
        spreads.append(found.std().item())
    assert spreads[0] == pytest.approx(spreads[1], rel=0.03)
    model = ones()
    lost = moved(ours.ModelEmaV3(model, decay=0.999, stochastic_rounding=False), model)
    assert lost.eq(1.0).all()


@SLOW
def test_rounding_may_be_switched_and_averages_converted_later() -> None:
    model = ones(torch.float32)
    averaged = ours.ModelEmaV3(model, decay=0.999)
    averaged.update(model)
    averaged.bfloat16()  # in place: no tensor is another object
    assert moved(averaged, model).unique().numel() > 2
    averaged.stochastic_rounding = False
    before = averaged.module.weight.detach().clone()
    averaged.update(model)
    expected = torch.lerp(before.float(), model.weight, 1.0 - 0.999).bfloat16()
    assert torch.equal(averaged.module.weight, expected)


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    found = []
    for seed in (0, 0, 5, -5):
        model = ones()
        averaged = ours.ModelEmaV3(model, decay=0.999, stochastic_rounding_seed=seed)
        found.append(moved(averaged, model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[2], found[3])


def test_a_resumed_run_that_tells_its_steps_goes_on_to_the_bit() -> None:
    model = conv_net(dtype=torch.bfloat16)
    whole = ours.ModelEmaV3(model, decay=0.99)
    random = generator()
    for step in range(10):
        train(model, random)
        whole.update(model, step=step)
        if step == 4:
            resumed = ours.ModelEmaV3(model, decay=0.99)
            resumed.load_state_dict(whole.state_dict())
            carried = copy.deepcopy(whole)
        if step > 4:
            resumed.update(model, step=step)
            carried.update(model, step=step)
    assert differences(snapshot(resumed), snapshot(whole)) == []
    assert differences(snapshot(carried), snapshot(whole)) == []


def test_steps_that_stand_still_draw_new_bits() -> None:
    """An epoch's number, say. Equal bits would round all changes the same way, most to nothing."""
    model = ones()
    averaged = ours.ModelEmaV3(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1.25)
    for _ in range(60):
        averaged.update(model, step=5)
    exact = 1.25 - 0.25 * 0.999**60
    assert averaged.module.weight.float().mean().item() == pytest.approx(exact, abs=4e-4)


def test_the_global_generator_is_left_alone() -> None:
    model = ones()
    averaged = ours.ModelEmaV3(model)
    before = torch.get_rng_state()
    averaged.update(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_dtypes_beside_bfloat16_are_as_theirs() -> None:
    model = without_integers(torch.bfloat16)
    model.norm.float()
    our, their = both("ModelEmaV3", model, decay=0.9)
    random = generator()
    for _ in range(20):
        train(model, random)
        for averaged in (our, their):
            averaged.update(model)
    assert differences(snapshot(our.module.norm), snapshot(their.module.norm)) == []
    assert not torch.equal(our.module.hidden.weight, their.module.hidden.weight)


# What is different on purpose: first the original's behaviour, then ours.


def test_integers_are_current_where_v2_cuts_them_off() -> None:
    model = conv_net()
    our, their = both("ModelEmaV2", model, decay=0.5)
    for count in (1, 4):
        model.norm.num_batches_tracked.fill_(count)
        for averaged in (our, their):
            averaged.update(model)
    assert their.module.norm.num_batches_tracked == 2
    assert our.module.norm.num_batches_tracked == 4


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_tied_weights_are_averaged_once_where_theirs_are_averaged_twice(kind: str) -> None:
    model = Tied()
    nn.init.zeros_(model.encoder.weight)
    our, their = both(kind, model, decay=0.75)
    nn.init.ones_(model.encoder.weight)
    for averaged in (our, their):
        averaged.update(model)
    assert their.module.encoder.weight.unique().tolist() == [1 - 0.75**2]
    assert our.module.encoder.weight.unique().tolist() == [0.25]


def test_tied_weights_are_averaged_once_on_both_sides_without_buffers() -> None:
    model = Tied()
    assert_equal_for(3, model, *both("ModelEmaV3", model, decay=0.75, exclude_buffers=True))


@pytest.mark.parametrize("exclude_buffers", [False, True], ids=["buffers too", "parameters"])
def test_non_persistent_buffers_are_left_or_copied_as_theirs(exclude_buffers: bool) -> None:
    model = Cached()
    our, their = both("ModelEmaV3", model, decay=0.5, exclude_buffers=exclude_buffers)
    assert_equal_for(3, model, our, their)
    assert torch.equal(our.module.cache, model.cache) == exclude_buffers
    assert_equal_for(3, model, *both("ModelEmaV2", model, decay=0.5))


@SLOW
def test_complex_tensors_are_averaged_where_v3_copies_them() -> None:
    model = nn.ParameterList([torch.zeros(2, dtype=torch.complex64)])
    our, their = both("ModelEmaV3", model, decay=0.75)
    with torch.no_grad():
        model[0].fill_(1 + 1j)
    for averaged in (our, their):
        averaged.update(model)
    assert their.module[0].tolist() == [1 + 1j] * 2
    assert our.module[0].tolist() == [0.25 + 0.25j] * 2


def test_another_dtype_is_computed_in_the_wider_where_v2_rounds_first() -> None:
    model = nn.Linear(50, 50).bfloat16()
    our, their = both("ModelEmaV2", model, decay=0.9)
    for averaged in (our, their):
        averaged.module.float()
    train(model, generator())
    exact = 0.9 * our.module.weight.double() + 0.1 * model.weight.double()
    for averaged in (our, their):
        averaged.update(model)
    errors = [(a.module.weight - exact).abs().max() for a in (our, their)]
    assert errors[0] < 1e-6 < 1e-5 < errors[1]


def test_without_timm_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ema_fused.adapters.timm")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'ema_fused\[timm\]'"):
        import ema_fused.adapters.timm  # noqa: F401
