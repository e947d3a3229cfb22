"""Conversions that swap the contents of tensors (``torch.utils.swap_tensors``): objects stay.

torch swaps only tensors that nothing else uses; a prepared update must not count as a use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.engine.plan import Plan
from tests.networks import CPU_BACKENDS, differences, snapshot


@pytest.fixture
def contents_are_swapped() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def other_state() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(value, 3) for name, value in net().state_dict().items()}


def load_average(averaged: BaseAveragedModel, model: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    averaged.load_state_dict(state | {"steps": torch.tensor(5)})


CONVERSIONS: dict[str, Callable[[BaseAveragedModel, nn.Module], object]] = {
    "double": lambda averaged, model: model.double(),
    "load": lambda averaged, model: model.load_state_dict(other_state()),
    "average-double": lambda averaged, model: averaged.double(),
    "average-load": load_average,
    "swap": lambda averaged, model: torch.utils.swap_tensors(
        model[0].weight, nn.Parameter(torch.ones(3, 3))
    ),
}


def with_updates(kind: type, conversion: str, backend: str | None) -> dict[str, torch.Tensor]:
    """The average after a conversion in the middle."""
    model = net()
    averaged = kind(model, 0.25, backend=backend)
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step)
        averaged.update_parameters(model)
        with averaged.swapped(model):
            pass
        if step == 2:
            CONVERSIONS[conversion](averaged, model)
    return snapshot(averaged)


@pytest.mark.usefixtures("contents_are_swapped")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_models_and_averages_are_converted_between_updates(
    kind: type, conversion: str, backend: str | None
) -> None:
    swapped = with_updates(kind, conversion, backend)
    torch.__future__.set_swap_module_params_on_conversion(False)
    assert differences(swapped, with_updates(kind, conversion, backend)) == []


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_plan_sees_the_contents_that_were_swapped_in(backend: str | None) -> None:
    averaged, source = torch.zeros(4), torch.ones(4)
    plan = Plan([averaged], [source], backend=backend)
    plan.lerp_(0.5)
    torch.utils.swap_tensors(source, torch.full((4,), 8.5))
    plan.lerp_(0.5)
    assert averaged.tolist() == [4.5] * 4
    torch.utils.swap_tensors(source, torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="the source was planned as float32"):
        plan.lerp_(0.5)
    assert averaged.tolist() == [4.5] * 4
