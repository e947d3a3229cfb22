"""The count of updates as the short way of an update presumes it, and the schedule that gets it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.engine import backends
from tests.networks import Weight, conv_net, values_of


def _fill(averaged: BaseAveragedModel) -> None:
    averaged.steps.fill_(7)


def _load(averaged: BaseAveragedModel) -> None:
    averaged.load_state_dict(averaged.state_dict() | {"steps": torch.tensor(7)})


def _replace(averaged: BaseAveragedModel) -> None:
    averaged.register_buffer("steps", torch.tensor(7))


def _give_other_memory(averaged: BaseAveragedModel) -> None:
    averaged.steps.data = torch.tensor(averaged.steps.item())
    averaged.steps.fill_(7)


@pytest.mark.parametrize("write", [_fill, _load, _replace, _give_other_memory])
def test_a_step_count_that_other_code_writes_is_the_next_step(
    write: Callable[[BaseAveragedModel], None],
) -> None:
    seen: list[int] = []

    def momentum(step: int) -> float:
        seen.append(step)
        return 0.5

    averaged = ExponentialMovingAverage(Weight(), momentum)
    model = Weight(1.0)
    for _ in range(4):
        averaged.update_parameters(model)
    write(averaged)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    # Asked once too often at most: the count is presumed before it is looked at.
    assert seen[:3] == [1, 2, 3] and seen[-2:] == [7, 8] and len(seen) <= 6
    assert int(averaged.steps) == 9


def test_a_count_that_the_extension_cannot_reach_is_counted_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the count lies on a device."""
    monkeypatch.setattr(backends, "counter_of", lambda _: None)
    averaged = ExponentialMovingAverage(Weight(), 0.5)
    assert values_of(averaged, [1.0, 2.0, 4.0, 8.0]) == [1.0, 1.5, 2.75, 5.375]
    assert int(averaged.steps) == 4
    averaged.steps.fill_(0)
    assert values_of(averaged, [3.0, 5.0]) == [3.0, 4.0]


def test_a_schedule_that_ends_does_not_fail_where_the_count_was_set_back() -> None:
    table = [0.1, 0.2, 0.3, 0.4]
    averaged = ExponentialMovingAverage(Weight(), lambda step: table[step])
    model = Weight(1.0)
    for _ in range(4):
        averaged.update_parameters(model)
    with pytest.raises(IndexError):
        averaged.update_parameters(model)
    averaged.steps.fill_(1)
    averaged.update_parameters(model)
    assert int(averaged.steps) == 2


@pytest.mark.filterwarnings("ignore:averages are kept in 16 bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_schedule_is_asked_once_for_each_average(dtype: torch.dtype) -> None:
    """Also where the model has to be paired again, and where the changes are rounded away."""
    model = conv_net(dtype=dtype)
    weights = iter([1e-4] * 5)
    averaged = ExponentialMovingAverage(model, lambda _: next(weights))
    for step in range(6):
        if step in (2, 4):
            model.conv.weight = nn.Parameter(model.conv.weight.detach().clone())
        averaged.update_parameters(model)
    assert next(weights, None) is None
