"""torchtitan's EMA in one process: times, decays, buffers, checkpoints and errors of the original.

With several processes: test_torchtitan_ranks.py.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from tests.frameworks.adapters.adapter_cases import no_value_asked_of
from tests.frameworks.titan import import_torchtitan, restated
from tests.networks import Tied, conv_net, generator, train
from tests.wrapper_tensors import Wrapped

try:
    import_torchtitan()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

from torchtitan.components.optimizer import OptimizersContainer

from ema_fused.adapters.torchtitan import EMA

WITH_BUFFERS = {"buffer_patterns": ["running_", "^scale$"]}
OFFLOADED = pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")  # nothing to overlap


def two_parts(dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """Model parts of a pipeline, with names of their own."""
    return [nn.ModuleDict({str(i): conv_net(i, dtype)}) for i in range(2)]


def built(parts: list[nn.Module], **options: Any) -> Any:
    return EMA.Config(**options).build(model_parts=parts)


def values(ema: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in ema.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def move(parts: list[nn.Module], random: torch.Generator) -> None:
    for part in parts:
        train(part, random)


# ---- Numbers -------------------------------------------------------------------------------------


@OFFLOADED
@pytest.mark.parametrize("offload", [False, True], ids=["here", "offloaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_hundred_steps_are_equal_to_the_bit(dtype: torch.dtype, offload: bool) -> None:
    parts = two_parts(dtype)
    ours = built(parts, buffer_patterns=["running_"], offload_to_cpu=offload)
    theirs = restated(parts, patterns=("running_",))
    random = generator()
    for step in range(1, 101):
        ours.wait_until_read()
        move(parts, random)
        ours.step(step)
        theirs.step(step)
    assert_equal(values(ours), values(theirs))


def test_all_parts_take_one_launch() -> None:
    ema = built(two_parts(), **WITH_BUFFERS)
    ema.step(1)
    plan = ema._updates.plan(ema._find)
    assert plan.launches == 1
    assert plan.tensors == len(ema.state_dict()) == 2 * (7 + 2)


@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ({"decay": 0.9}, {1: 0.9, 2: 0.9, 3: 0.9}),
        ({"half_life_fraction": 0.5}, {1: 0.25, 2: 0.5, 3: 2 ** (-2 / 3)}),
        ({"half_life_fraction": 0.5, "step_bias": 1}, {1: 0.5, 2: 2 ** (-2 / 3)}),
        ({"half_life_fraction": 0.5, "start_step": 2}, {1: None, 2: None, 3: 0.25, 4: 0.5}),
        (
            {"half_life_fraction": 0.5, "start_step": 1, "update_every_n_steps": 2, "step_bias": 1},
            {1: None, 2: None, 3: 0.5, 4: None, 5: 2 ** (-2 / 3)},
        ),
    ],
    ids=str,
)
def test_updates_come_at_the_originals_steps_with_its_decays(
    options: dict[str, Any], decays: dict[int, float | None]
) -> None:
    model = conv_net()
    ema = built([model], **options)
    random = generator()
    for step, decay in decays.items():
        before = values(ema)["state.conv.weight.ema_params"]
        train(model, random)
        ema.step(step)
        expected = before if decay is None else torch.lerp(before, model.conv.weight, 1 - decay)
        assert torch.equal(values(ema)["state.conv.weight.ema_params"], expected), step


def test_a_resumed_step_has_the_decay_of_its_number() -> None:
    model = conv_net()
    first, second = built([model]), built([model])
    train(model, generator())
    first.step(1000)  # no counter: the same as the thousandth call
    assert not torch.equal(values(first)["state.conv.weight.ema_params"], model.conv.weight), (
        "the decay of a first update"
    )
    second.load_state_dict(values(first))
    for ema in (first, second):
        ema.step(1001)
    assert_equal(values(first), values(second))


# ---- What is tracked -----------------------------------------------------------------------------


def test_it_is_a_container_and_its_configuration_builds_it() -> None:
    ema = built([conv_net()])
    assert isinstance(ema, OptimizersContainer)
    assert [option.name for option in dataclasses.fields(EMA.Config)] == [
        "decay",
        "half_life_fraction",
        "start_step",
        "step_bias",
        "update_every_n_steps",
        "offload_to_cpu",
        "buffer_patterns",
    ]
    with pytest.raises(RuntimeError, match=r"must not be step\(\)-ed.* EMA.step\(current_step\)"):
        next(iter(ema)).step()
    model = ema.model_parts[0]
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    ema.zero_grad()
    assert model.conv.weight.grad is not None


def test_frozen_parameters_are_left_out_and_tied_ones_are_there_once() -> None:
    model = conv_net()
    model.head.requires_grad_(False)
    keys = list(built([model]).state_dict())
    assert keys[0] == "state.conv.weight.ema_params"
    assert not any("head" in key for key in keys)
    assert list(built([Tied()]).state_dict()) == ["state.encoder.weight.ema_params"]


def test_checkpointed_layers_have_plain_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    assert list(built([model]).state_dict()) == [
        "state.0.weight.ema_params",
        "state.0.bias.ema_params",
    ]


def test_a_part_without_tracked_tensors_can_be_saved() -> None:
    """torchtitan's container asks the inner optimizer of that part for a step, which raises."""
    parts = [conv_net(), nn.Linear(2, 2)]
    with pytest.raises(NotImplementedError):
        restated(parts, patterns=("running_mean",)).state_dict()
    ema = built(parts, buffer_patterns=["running_mean"])
    ema.step(1)
    assert "state.norm.running_mean.ema_params" in ema.state_dict()
    parts[1].requires_grad_(False)
    assert len(built(parts).state_dict()) == 7


def test_a_parameter_frozen_later_keeps_its_average() -> None:
    model = conv_net()
    ema = built([model], decay=0.5)
    model.conv.requires_grad_(False)
    before = values(ema)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.step(1)
    now = values(ema)
    for key, value in now.items():
        assert torch.equal(value, before[key]) == key.startswith("state.conv."), key


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.head.requires_grad_(True),
        lambda model: setattr(model.conv, "weight", nn.Parameter(model.conv.weight.detach() + 1)),
        lambda model: model.norm.register_buffer("running_mean", torch.ones(5)),
        lambda model: setattr(model, "hidden", nn.Linear(5, 67)),
    ],
    ids=["unfrozen", "replaced", "a buffer", "a layer"],
)
def test_a_tensor_without_an_average_raises_and_nothing_is_updated(change: Any) -> None:
    model = conv_net()
    model.head.requires_grad_(False)
    parts = [conv_net(1), model]
    ema = built(parts, **WITH_BUFFERS)
    move(parts, generator())
    ema.step(1)
    before = values(ema)
    move(parts, generator())
    change(model)
    with pytest.raises(RuntimeError, match=r"EMA has no state for [12] of \d+ tensors \(first: '"):
        ema.step(2)
    assert_equal(values(ema), before)


def test_averages_that_other_code_replaced_are_followed() -> None:
    model = conv_net()
    ema = built([model], decay=0.5)
    ema.step(1)
    inner = next(iter(ema))
    inner.state[model.conv.weight]["ema_params"] = torch.zeros_like(model.conv.weight)
    ema.step(2)
    key = "state.conv.weight.ema_params"
    assert torch.equal(ema.state_dict()[key], model.conv.weight.detach() * 0.5)
    inner.load_state_dict(copy.deepcopy(inner.state_dict()))  # torch's own: other objects
    ema.step(3)
    assert torch.equal(ema.state_dict()[key], model.conv.weight.detach() * 0.75)
    del inner.state[model.conv.weight]["ema_params"]
    with pytest.raises(RuntimeError, match=r"no state for 1 of 7 tensors \(first: 'conv\.weight'"):
        ema.step(4)


def test_a_model_converted_in_place_goes_on_in_the_averages_dtype() -> None:
    model = conv_net()
    ema = built([model], decay=0.5)
    ema.step(1)
    model.bfloat16()
    before = values(ema)["state.conv.weight.ema_params"]
    ema.step(2)
    expected = torch.lerp(before, model.conv.weight.detach().float(), 0.5)
    assert torch.equal(values(ema)["state.conv.weight.ema_params"], expected)


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_tensors_of_other_classes_are_averaged() -> None:
    """The weights of float8 training are such."""
    model = nn.Linear(3, 3, bias=False)
    start = model.weight.detach().clone()
    model.weight = nn.Parameter(Wrapped(model.weight.detach().clone()))
    ema = built([model], decay=0.5)
    with torch.no_grad():
        model.weight.add_(1)
    ema.step(1)
    average: Any = ema.state_dict()["state.weight.ema_params"]
    torch.testing.assert_close(average.inside, start + 0.5)


def test_updates_ask_no_tensor_for_its_value() -> None:
    parts = two_parts()
    ema = built(parts, **WITH_BUFFERS)
    ema.step(1)
    with no_value_asked_of():
        for step in range(2, 5):
            ema.step(step)


@OFFLOADED
def test_a_dropped_average_is_freed_with_its_hooks() -> None:
    model = conv_net()
    hooks = len(_global_optimizer_pre_hooks)
    ema = built([model], offload_to_cpu=True)
    ema.step(1)
    assert len(_global_optimizer_pre_hooks) == hooks + 1
    reference = weakref.ref(ema)
    del ema
    gc.collect()
    assert reference() is None
    assert len(_global_optimizer_pre_hooks) == hooks


@OFFLOADED
def test_the_optimizer_waits_for_an_offloaded_update() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, theirs = built([model], offload_to_cpu=True), restated([model])
    assert all(not value.is_cuda for value in ema.state_dict().values())
    for step in range(1, 30):
        model(torch.randn(4, 1, 8, 8, generator=generator(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.step(step)
        ema.step(step)
    assert_equal(values(ema), values(theirs))


# ---- Checkpoints ---------------------------------------------------------------------------------


@OFFLOADED
@pytest.mark.parametrize("offload", [False, True], ids=["here", "offloaded"])
def test_states_are_read_both_ways(offload: bool) -> None:
    model = conv_net()
    ours, theirs = built([model], offload_to_cpu=offload), restated([model])
    random = generator()
    for step in range(1, 4):
        train(model, random)
        theirs.step(step)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for step in range(4, 8):
        ours.wait_until_read()
        train(model, random)
        ours.step(step)
        theirs.step(step)
    assert_equal(values(ours), values(theirs))
    again = restated([model])
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for ema in (again, theirs):
        ema.step(8)
    assert_equal(values(again), values(theirs))


def test_keys_of_other_tensors_are_ignored_and_missing_ones_are_told() -> None:
    model = conv_net()
    ema = built([model])
    state = values(ema)
    ema.load_state_dict({**state, "state.elsewhere.ema_params": torch.zeros(1)})
    before = values(ema)
    changed = {key: value + 1 for key, value in state.items() if "conv" not in key}
    with pytest.raises(
        KeyError, match=r"state\.conv\.weight\.ema_params, state\.conv\.bias\.ema_params: missing"
    ):
        ema.load_state_dict(changed)
    assert_equal(values(ema), before)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(2), ValueError, r"shape \(2,\); \(5, 1, 3, 3\) is expected"),
        (1.0, TypeError, "is a float; a tensor is expected"),
    ],
    ids=["shape", "number"],
)
def test_a_value_that_does_not_fit_raises(value: Any, error: Any, message: str) -> None:
    ema = built([conv_net()])
    before = values(ema)
    state = {key: tensor + 1 for key, tensor in before.items()}
    with pytest.raises(error, match=rf"state\.conv\.weight\.ema_params .*{message}"):
        ema.load_state_dict({**state, "state.conv.weight.ema_params": value})
    assert_equal(values(ema), before)


@OFFLOADED
@pytest.mark.parametrize("offload", [False, True], ids=["here", "offloaded"])
def test_a_checkpoint_without_averages_starts_from_the_weights_and_says_so(
    caplog: pytest.LogCaptureFixture, offload: bool
) -> None:
    model = conv_net()
    ema = built([model], offload_to_cpu=offload, **WITH_BUFFERS)
    train(model, generator())
    with caplog.at_level(logging.WARNING):
        ema.load_state_dict({})
    assert "EMA state was not restored; cold-starting it" in caplog.text
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, value in ema.state_dict().items():
        assert torch.equal(value, live[key.removeprefix("state.").removesuffix(".ema_params")])


# ---- Errors and warnings of the original ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every_n_steps": 0}, "ema.update_every_n_steps must be greater than 0."),
        ({"half_life_fraction": float("nan")}, "ema.half_life_fraction must be finite."),
        ({"half_life_fraction": 0.0}, "ema.half_life_fraction must be greater than 0."),
        ({"step_bias": -1}, "ema.step_bias must not be negative"),
        ({"decay": 1.0}, "ema.decay must be finite and in [0, 1)"),
        ({"decay": float("nan")}, "ema.decay must be finite and in [0, 1)"),
        ({"decay": -0.1}, "ema.decay must be finite and in [0, 1)"),
    ],
    ids=str,
)
def test_a_wrong_option_raises_in_the_originals_words(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        EMA.Config(**options)
    assert str(next(iter(options.values()))) in str(raised.value)


def test_a_half_life_beside_a_decay_is_told(caplog: pytest.LogCaptureFixture) -> None:
    EMA.Config(decay=0.9)
    EMA.Config(half_life_fraction=0.1)
    assert caplog.text == ""
    EMA.Config(decay=0.9, half_life_fraction=0.1)
    assert "ema.half_life_fraction=0.1 is ignored because ema.decay=0.9 is set" in caplog.text


def test_integer_buffers_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"matched buffer 'norm\.num_batches_tracked' of dtype torch\.int64"
    ):
        built([conv_net()], buffer_patterns=["norm"])


def test_patterns_that_match_nothing_and_16_bits_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    built([conv_net()], **WITH_BUFFERS)
    assert caplog.text == ""
    built([conv_net(dtype=torch.bfloat16)], buffer_patterns=["expert_bias"])
    assert "buffer_patterns=['expert_bias'] matched no buffers across any model part" in caplog.text
    assert "EMA is tracking torch.bfloat16 tensors" in caplog.text
