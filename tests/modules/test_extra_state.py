"""State that modules keep beside tensors, or save under other names: nothing of it is lost."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.posthoc.power_function import PowerFunctionEMA
from ema_fused.posthoc.reconstruction import reconstruct
from ema_fused.saving.export import export_safetensors, model_state_dict
from tests.networks import differences, snapshot


class Scaled(nn.Linear):
    """Keeps the largest input beside its tensors, as layers in 8 bits do."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.amax = {"input": 1.0}
        self.asked = 0

    def get_extra_state(self) -> dict[str, float]:
        self.asked += 1
        return self.amax

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.amax = state

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.amax["input"]


class Fused(nn.Module):
    """One projection in memory, three in its state, as fused attention layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.rand(9, 3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_state_dict_post_hook(_split)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_join)  # type: ignore[no-untyped-call]


def _split(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    state.update(zip([prefix + x for x in "qkv"], state.pop(f"{prefix}qkv").chunk(3), strict=True))


def _join(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    state[f"{prefix}qkv"] = torch.cat([state.pop(prefix + x) for x in "qkv"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Fused()
        self.linear = Scaled()
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.linear.weight
        self.norm = nn.BatchNorm1d(3)


def _trained(model: nn.Module, amax: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    next(part for part in model.modules() if isinstance(part, Scaled)).amax = {"input": amax}


def test_the_plain_model_loads_the_averages_strictly(tmp_path: Any) -> None:
    model, other = Model(), Model()
    averaged = AveragedWeights(model, 0.5, averaged_dtype=torch.float64)
    power = PowerFunctionEMA(model, 0.1)
    for amax in (2.0, 4.0):
        _trained(model, amax)
        averaged.update_parameters(model)
        power.update_parameters(model)
    power.save_snapshot(tmp_path)
    held, tensors = dict(model.named_parameters()), snapshot(model)
    for weights in (averaged.weights, power.average(), reconstruct(tmp_path, 0.1)):
        assert "attention.qkv" in weights and "attention.q" not in weights
        state = model_state_dict(model, weights)
        assert state.keys() == model.state_dict().keys()
        assert state["linear._extra_state"] == {"input": 4.0}
        assert state["linear.bias"].data_ptr() == weights["linear.bias"].data_ptr()
        other.load_state_dict(state)
        torch.testing.assert_close(other.attention.qkv, weights["attention.qkv"].float())
        assert other.linear.amax == {"input": 4.0}
        # The model itself has been left as it was.
        assert all(held[name] is tensor for name, tensor in model.named_parameters())
        assert differences(snapshot(model), tensors) == []
        assert other.tied.weight is other.linear.weight
    assert state["linear.weight"].equal(state["tied.weight"])
    for step in range(2):  # it is still paired
        averaged.update_parameters(model)
        assert averaged.steps == 3 + step


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_the_names_are_those_of_the_model_inside_a_wrapper(wrap: Any) -> None:
    model = Model()
    averaged = AveragedWeights(model, 0.5)
    averaged.update_parameters(model)
    state = model_state_dict(wrap(model), averaged.weights)
    Model().load_state_dict(state)
    Model().load_state_dict(model_state_dict(Model(), averaged.weights))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_parts_have_their_weights_back() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 3))
    averaged = AveragedWeights(model, 0.5)
    averaged.update_parameters(model)
    before = dict(model.named_parameters())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    state = model_state_dict(model, averaged.weights)
    assert torch.equal(state["0.weight"], averaged.weights["0.weight"])
    assert not torch.equal(state["0.weight"], model[0].weight)
    assert all(before[name] is tensor for name, tensor in model.named_parameters())


class _Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt


def test_the_model_is_itself_again_whatever_is_raised() -> None:
    model = _Fails()
    weights = {"weight": torch.zeros(2)}
    before = model.weight
    with pytest.raises(KeyboardInterrupt):
        model_state_dict(model, weights)
    assert model.weight is before
    with pytest.raises(KeyError, match=r"unexpected in the model: weight"):
        model_state_dict(model, {"bias": torch.zeros(2)})
    averaged = AveragedWeights(model, 0.5)
    with averaged.swapped(model), pytest.raises(RuntimeError, match="while averaged weights are"):
        model_state_dict(model, weights)


def test_a_state_beside_tensors_is_no_safetensors_file(tmp_path: Any) -> None:
    model = Model()
    state = model_state_dict(model, AveragedWeights(model, 0.5).weights)
    with pytest.raises(TypeError, match=r"'linear\._extra_state' is a dict"):
        export_safetensors(state, tmp_path / "export")
    state.pop("linear._extra_state")
    export_safetensors(state, tmp_path / "export")


# Copies of the module.


def test_a_copy_takes_the_extra_state_over_when_it_is_looked_at() -> None:
    model = Model()
    averaged: Any = ExponentialMovingAverage(model, 0.5)
    for amax in (2.0, 4.0):
        _trained(model, amax)
        averaged.update_parameters(model)
    asked = model.linear.asked
    assert averaged.module.linear.amax == {"input": 4.0}
    assert averaged.module.linear.amax is not model.linear.amax
    state = averaged.state_dict()
    assert state["module.linear._extra_state"] == {"input": 4.0}
    assert model.linear.asked == asked + 1, "it is asked once for each update at most"
    Model().load_state_dict(averaged.module.state_dict())
    _trained(model, 8.0)
    averaged.update_parameters(model)
    assert model.linear.asked == asked + 1, "an update itself asks for nothing"
    assert averaged.state_dict()["module.linear._extra_state"] == {"input": 8.0}
    _trained(model, 16.0)
    averaged.copy_from(model)
    assert copy.deepcopy(averaged).module.linear.amax == {"input": 16.0}
    fresh = Model()
    averaged.copy_to(nn.DataParallel(fresh))
    assert fresh.linear.amax == {"input": 16.0} and fresh.linear.amax is not model.linear.amax


@pytest.mark.parametrize(
    "options",
    [{"offload": "cpu"}, {"rounding": "stochastic"}, {"interval": 2}, {"every": 2}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_so_it_does_with_every_option(options: dict[str, Any]) -> None:
    model = nn.Sequential(Scaled(), nn.BatchNorm1d(3))
    averaged: Any = ExponentialMovingAverage(model, 0.5, **options)
    for amax in (2.0, 4.0):
        _trained(model, amax)
        averaged.update_parameters(nn.DataParallel(model))
    x = torch.rand(2, 3)
    twin = ExponentialMovingAverage(model, 0.5)
    twin.load_state_dict(averaged.state_dict(), strict=False)
    twin.module[0].amax = {"input": 4.0}
    assert torch.equal(averaged.eval()(x), twin.eval()(x))


def test_a_loaded_extra_state_stays_until_the_next_update() -> None:
    model, later = Model(), Model()
    averaged: Any = ExponentialMovingAverage(model, 0.5)
    averaged.update_parameters(model)
    _trained(later, 4.0)
    saved = ExponentialMovingAverage(later, 0.5).state_dict()
    averaged.load_state_dict(saved)
    assert averaged.module.linear.amax == {"input": 4.0}
    averaged.update_parameters(model)
    assert averaged.module.linear.amax == {"input": 1.0}
    del model
    gc.collect()
    assert averaged.module.linear.amax == {"input": 1.0}
