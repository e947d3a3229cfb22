"""ultralytics' ModelEMA beside ours: the same to the bit, and its checkpoints in half precision."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.adapters.adapter_cases import (
    assert_freed,
    no_value_asked_of,
    ultralytics_originals,
)
from tests.networks import Tied, conv_net, differences, generator, snapshot, train

try:
    theirs = ultralytics_originals()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

from ema_fused.adapters import ultralytics as ours


def both(model: nn.Module, **arguments: Any) -> tuple[Any, Any]:
    return ours.ModelEMA(model, **arguments), theirs.ModelEMA(model, **arguments)


def assert_equal_for(steps: int, model: nn.Module, our: Any, their: Any) -> None:
    random = generator()
    for step in range(steps):
        train(model, random)
        for averaged in (our, their):
            averaged.update(model)
        assert differences(snapshot(our.ema), snapshot(their.ema)) == [], f"after call {step}"
        assert our.updates == their.updates


@pytest.mark.parametrize("tau", [2000, 5])
@pytest.mark.parametrize("decay", [0.9999, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_hundred_updates_are_equal_to_the_bit(
    dtype: torch.dtype, decay: float, tau: float
) -> None:
    model = conv_net(dtype=dtype)
    assert_equal_for(100, model, *both(model, decay=decay, tau=tau))


def test_a_count_from_elsewhere_is_gone_on_from() -> None:
    model = conv_net()
    our, their = both(model, tau=100, updates=40)
    assert_equal_for(3, model, our, their)
    our.updates = their.updates = 1000  # as a resumed run sets it
    assert_equal_for(3, model, our, their)


def test_integers_stay_as_they_are_in_both() -> None:
    model = conv_net()
    our, their = both(model)
    before = int(our.ema.norm.num_batches_tracked)
    assert_equal_for(5, model, our, their)
    assert int(model.norm.num_batches_tracked) > before
    assert int(our.ema.norm.num_batches_tracked) == before


def test_nothing_is_updated_or_counted_unless_enabled() -> None:
    model = conv_net()
    our, their = both(model)
    our.enabled = their.enabled = False
    before = snapshot(our.ema)
    assert_equal_for(3, model, our, their)
    assert our.updates == 0
    assert differences(snapshot(our.ema), before) == []
    our.enabled = their.enabled = True
    assert_equal_for(3, model, our, their)


def test_attributes_are_copied_as_in_the_original() -> None:
    model = conv_net()
    pair = both(model)
    model.names, model.stride, model._private = ["cat"], 32, 1  # type: ignore[assignment]
    for averaged in pair:
        averaged.update_attr(model, include=["names", "_private"])
        assert averaged.ema.names == ["cat"]
        assert not hasattr(averaged.ema, "stride") and not hasattr(averaged.ema, "_private")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_is_averaged_by_its_plain_names(wrap: Any) -> None:
    model = conv_net()
    our, their = both(wrap(model))
    assert list(our.ema.state_dict()) == list(model.state_dict())
    random = generator()
    for step in range(4):
        train(model, random)
        for averaged in (our, their):
            averaged.update(wrap(model) if step % 2 else model)
        assert differences(snapshot(our.ema), snapshot(their.ema)) == []


def test_a_teacher_of_the_model_is_left_out() -> None:
    model = conv_net()
    model.teacher_model = nn.Linear(3, 3)
    our, their = both(model)
    assert our.ema.teacher_model is None
    assert_equal_for(3, model, our, their)


def test_tied_weights_are_averaged_once() -> None:
    model = Tied()
    our, their = both(model)
    before = snapshot(our.ema)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    our.update(model)
    weight = 1 - our.decay(1)
    expected = torch.lerp(before["encoder.weight"], model.encoder.weight.detach(), weight)
    assert torch.equal(our.ema.decoder.weight, expected)
    their.update(model)  # the original averages them once for each name
    assert differences(snapshot(our.ema), snapshot(their.ema)) != []


def saved(averaged: Any) -> dict[str, Any]:
    """What a trainer of ultralytics writes of an average, read again."""
    buffer = io.BytesIO()
    half = copy.deepcopy(averaged.ema).half()
    torch.save({"ema": half, "updates": averaged.updates}, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=False)
    return loaded


def test_a_run_resumes_from_a_checkpoint_in_half_precision() -> None:
    model = conv_net()
    our, their = both(model, tau=10)
    assert_equal_for(20, model, our, their)
    resumed = both(model, tau=10)
    for averaged, before in zip(resumed, (our, their), strict=True):
        checkpoint = saved(before)
        assert checkpoint["ema"].conv.weight.dtype == torch.float16
        averaged.ema.load_state_dict(checkpoint["ema"].float().state_dict())
        averaged.updates = checkpoint["updates"]
    assert_equal_for(20, model, *resumed)
    assert resumed[0].updates == 40


def values_after(averaged: Any, model: nn.Module) -> dict[str, Tensor]:
    averaged.update(model)
    return snapshot(averaged.ema)


def test_a_model_converted_in_place_is_followed() -> None:
    model = conv_net()
    our = ours.ModelEMA(model)
    our.update(model)
    model.double()
    before = snapshot(our.ema)
    now = values_after(our, model)
    assert all(now[name].dtype == before[name].dtype for name in now)
    weight = 1 - our.decay(2)
    expected = torch.lerp(before["conv.weight"].double(), model.conv.weight, weight)
    torch.testing.assert_close(now["conv.weight"], expected.float(), rtol=1e-6, atol=1e-7)


def replace_parameter(weight: Tensor, model: nn.Module) -> None:
    model.conv.weight = nn.Parameter(weight)


def replace_memory(weight: Tensor, model: nn.Module) -> None:
    model.conv.weight.data = weight  # type: ignore[union-attr]


@pytest.mark.parametrize("replace", [replace_parameter, replace_memory])
def test_replaced_tensors_are_followed_where_the_original_keeps_the_old_ones(
    replace: Callable[[Tensor, nn.Module], None],
) -> None:
    model = conv_net()
    our, their = both(model)
    assert_equal_for(1, model, our, their)
    replace(torch.full_like(model.conv.weight, 100.0, requires_grad=False), model)
    before = snapshot(our.ema)["conv.weight"]
    weight = 1 - our.decay(2)
    expected = torch.lerp(before, model.conv.weight.detach(), weight)
    assert torch.equal(values_after(our, model)["conv.weight"], expected)
    assert not torch.equal(values_after(their, model)["conv.weight"], expected)


def test_an_error_leaves_averages_and_count_as_they_were() -> None:
    model = conv_net()
    our = ours.ModelEMA(model)
    our.update(model)
    before = snapshot(our.ema)
    with pytest.raises(KeyError, match=r"scale, conv\.weight, conv\.bias and .* missing"):
        our.update(nn.Linear(3, 3))
    other = conv_net()
    other.norm.register_buffer("running_mean", torch.zeros(1))
    with pytest.raises(ValueError, match=r"norm\.running_mean"):
        our.update(other)
    assert our.updates == 1
    assert differences(snapshot(our.ema), before) == []


def test_updates_ask_no_tensor_for_its_value() -> None:
    model = conv_net()
    our = ours.ModelEMA(model)
    with no_value_asked_of():
        for _ in range(3):
            our.update(model)


def test_neither_average_nor_model_is_kept_alive() -> None:
    def delete() -> weakref.ref[Any]:
        model = conv_net()
        our = ours.ModelEMA(model)
        our.update(model)
        return weakref.ref(our)

    assert_freed(delete)
