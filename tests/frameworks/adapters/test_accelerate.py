"""accelerate(): a wrapper in the middle of a training goes on with ours, and with equal numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import ema_fused
from ema_fused.adapters import accelerate
from tests import processes
from tests.frameworks.adapters.adapter_cases import (
    timm_originals,
    ultralytics_originals,
    without_integers,
)
from tests.networks import conv_net, generator, train


class Case(NamedTuple):
    make: Callable[[nn.Module], Any]
    update: Callable[[Any, nn.Module], object]
    tensors: Callable[[Any], list[Tensor]]
    to_the_bit: bool = True


def _state(wrapper: nn.Module) -> list[Tensor]:
    return list(wrapper.state_dict().values())


def _swa(**arguments: Any) -> Case:
    return Case(
        lambda model: swa_utils.AveragedModel(model, **arguments),
        lambda wrapper, model: wrapper.update_parameters(model),
        _state,
        to_the_bit=bool(arguments),
    )


def _timm(kind: str) -> Case:
    def make(model: nn.Module) -> Any:
        try:
            return getattr(timm_originals(), kind)(model, decay=0.9)
        except FileNotFoundError as error:
            pytest.skip(str(error))

    return Case(make, lambda wrapper, model: wrapper.update(model), _state)


def _diffusers(model: nn.Module) -> Any:
    original = pytest.importorskip("diffusers.training_utils")
    return original.EMAModel(model.parameters(), foreach=True)


def _ema_pytorch(model: nn.Module) -> Any:
    original = pytest.importorskip("ema_pytorch")
    return original.EMA(model, update_after_step=0, update_every=1, include_online_model=False)


def _torch_ema(model: nn.Module) -> Any:
    original = pytest.importorskip("torch_ema")
    return original.ExponentialMovingAverage(model.parameters(), decay=0.9)


def _ultralytics(model: nn.Module) -> Any:
    try:
        return ultralytics_originals().ModelEMA(model, decay=0.9, tau=50)
    except FileNotFoundError as error:
        pytest.skip(str(error))


CASES = {
    "AveragedModel": _swa(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True),
    "AveragedModel, mean": _swa(),
    "ModelEmaV2": _timm("ModelEmaV2"),
    "ModelEmaV3": _timm("ModelEmaV3"),
    "EMAModel": Case(
        _diffusers,
        lambda wrapper, model: wrapper.step(model.parameters()),
        lambda wrapper: wrapper.shadow_params,
    ),
    "EMA": Case(_ema_pytorch, lambda wrapper, _: wrapper.update(), _state),
    "ExponentialMovingAverage": Case(
        _torch_ema,
        lambda wrapper, _: wrapper.update(),
        lambda wrapper: wrapper.shadow_params,
        to_the_bit=False,
    ),
    "ModelEMA": Case(
        _ultralytics,
        lambda wrapper, model: wrapper.update(model),
        lambda wrapper: _state(wrapper.ema),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrapper_goes_on_with_equal_numbers(case: Case) -> None:
    models = [without_integers() for _ in range(2)]
    their, our = (case.make(model) for model in models)
    randoms = [generator() for _ in models]
    for step in range(120):
        if step == 20:
            cls, attributes = type(our), set(vars(our))
            name = f"{cls.__module__}.{cls.__qualname__}"
            assert accelerate(our).startswith(f"{name}: its update is now ema_fused.adapters.")
            assert type(our).__module__.startswith("ema_fused.adapters.")
            assert isinstance(our, cls)
        for wrapper, model, random in zip((their, our), models, randoms, strict=True):
            train(model, random)
            case.update(wrapper, model)
        pairs = zip(case.tensors(our), case.tensors(their), strict=True)
        for found, expected in pairs:
            if case.to_the_bit or step < 20:
                assert torch.equal(found, expected)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert set(vars(our)) - attributes <= {"_rounding_step"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_second_call_tells_that_it_is_done(case: Case) -> None:
    wrapper = case.make(conv_net())
    accelerate(wrapper)
    cls = type(wrapper)
    assert accelerate(wrapper) == f"{cls.__qualname__} is updated by ema_fused already"
    assert type(wrapper) is cls
    derived = type("Mine", (cls,), {})
    wrapper.__class__ = derived
    assert accelerate(wrapper) == "Mine is updated by ema_fused already"


class Derived(swa_utils.AveragedModel):
    pass


@pytest.mark.parametrize(
    "wrapper",
    [
        Derived(nn.Linear(1, 1)),
        nn.Linear(1, 1),
        ema_fused.ExponentialMovingAverage(nn.Linear(1, 1)),
        object(),
    ],
    ids=["derived", "a model", "ours", "object"],
)
def test_other_classes_raise_and_stay_what_they_are(wrapper: Any) -> None:
    cls = type(wrapper)
    with pytest.raises(TypeError, match=rf"{cls.__qualname__} can't be accelerated") as error:
        accelerate(wrapper)
    for name in (
        "torch.optim.swa_utils.AveragedModel",
        "timm.utils.model_ema.ModelEmaV3",
        "diffusers.training_utils.EMAModel",
        "ema_pytorch.ema_pytorch.EMA",
        "torch_ema.ema.ExponentialMovingAverage",
        "ultralytics.utils.torch_utils.ModelEMA",
    ):
        assert name in str(error.value)
    assert type(wrapper) is cls


def test_ema_pytorchs_average_of_a_tree_is_not_its_average_of_a_module() -> None:
    original = pytest.importorskip("ema_pytorch")
    with pytest.raises(TypeError, match="EMAPytree can't be accelerated"):
        accelerate(original.EMA([torch.zeros(1)]))


def test_an_accelerated_wrapper_is_copied_and_pickled_as_ours() -> None:
    wrapper = swa_utils.AveragedModel(nn.Linear(2, 2))
    accelerate(wrapper)
    assert type(copy.deepcopy(wrapper)) is type(wrapper)


def test_none_of_the_packages_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, torch, ema_fused.adapters as adapters\n"
        "from torch.optim.swa_utils import AveragedModel\n"
        "adapters.accelerate(AveragedModel(torch.nn.Linear(1, 1)))\n"
        "names = ('timm', 'diffusers', 'ema_pytorch', 'torch_ema', 'torchtitan', 'ultralytics')\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert processes.run("-c", code).stdout.strip() == "[]"
