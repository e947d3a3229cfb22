"""A state that is read by another kind of average, which weights the next value otherwise."""

from __future__ import annotations

import copy
import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed

from ema_fused import (
    AveragedWeights,
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
    schedules,
)
from tests.networks import differences, snapshot


class OwnFunction(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


Mean = StochasticWeightAverage
ByMomentum = partial(ExponentialMovingAverage, momentum=0.1)
MeanWeights = partial(AveragedWeights, momentum=schedules.mean, arithmetic="delta")
Weights = partial(AveragedWeights, momentum=0.1)
Warmup = partial(ExponentialMovingAverage, momentum=partial(schedules.warmup_power, power=0.7))
Unknown = partial(ExponentialMovingAverage, momentum=lambda steps: 1 / (steps + 1))


def updated(make: Any, times: int = 7, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    average = make(model, **options)
    for _ in range(times):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update_parameters(model)
    return average


def saved(average: nn.Module, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("reader", [Mean, MeanWeights], ids=["copy", "weights"])
@pytest.mark.parametrize(
    "writer",
    [ByMomentum, MomentumAnnealingEMA, Weights, Warmup],
    ids=["ema", "annealing", "w", "f"],
)
def test_a_mean_that_reads_another_average_says_so(
    writer: Any, reader: Any, weights_only: bool
) -> None:
    state = saved(updated(writer), weights_only)
    average = reader(nn.Linear(2, 2))
    with pytest.warns(
        UserWarning, match=r"of an average by a momentum.* of 7 values.* 1/8"
    ) as all_:
        average.load_state_dict(state)
    assert len(all_) == 1
    assert differences(snapshot(average), dict(state)) == []
    average.steps.fill_(1)  # what the message says
    model = nn.Linear(2, 2)
    average.update_parameters(model)
    weight = dict(average.module.named_parameters())["weight"]
    expected = (model.weight + state["module.weight"]) / 2
    torch.testing.assert_close(weight, expected.detach(), check_stride=False)


def test_an_interval_is_counted_in_averages() -> None:
    state = saved(updated(ByMomentum))
    with pytest.warns(UserWarning, match="the mean of 2 values"):
        StochasticWeightAverage(nn.Linear(2, 2), interval=3).load_state_dict(state)


def test_a_mean_that_is_read_by_others_is_one_value() -> None:
    state = saved(updated(Mean))
    with pytest.warns(UserWarning, match=r"of a mean of all values, and ExponentialMovingAverage"):
        ExponentialMovingAverage(nn.Linear(2, 2), 0.1).load_state_dict(state)


def test_a_part_of_a_larger_state_says_so_too() -> None:
    state = nn.ModuleDict({"teacher": updated(ByMomentum)}).state_dict()
    with pytest.warns(UserWarning, match="of an average by a momentum"):
        nn.ModuleDict({"teacher": Mean(nn.Linear(2, 2))}).load_state_dict(state)


def test_nothing_is_said_of_one_s_own_kind() -> None:
    same = [
        (ByMomentum, MomentumAnnealingEMA),
        (ByMomentum, Warmup),
        (Weights, ByMomentum),
        (Mean, MeanWeights),
        (Mean, Mean),
        (Unknown, Mean),  # it may be a mean, and this one is
        (OwnFunction, Mean),
        (ByMomentum, OwnFunction),
        (partial(ByMomentum, begin_step=20), Mean),  # a copy of the model still
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for writer, reader in same:
            reader(nn.Linear(2, 2)).load_state_dict(saved(updated(writer)))  # type: ignore[operator]
        copied = copy.deepcopy(updated(ByMomentum))
        copied.load_state_dict(copied.state_dict())


def test_states_that_do_not_name_their_kind_load_without_a_word(tmp_path: Path) -> None:
    average = updated(ByMomentum)
    plain = dict(average.state_dict())
    distributed.save(average.state_dict(), checkpoint_id=tmp_path)
    whole = Mean(nn.Linear(2, 2)).state_dict()
    distributed.load(whole, checkpoint_id=tmp_path)
    assert differences(dict(whole), plain) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mean(nn.Linear(2, 2)).load_state_dict(plain)
    # Nothing but the metadata names it.
    assert list(plain) == ["steps", "module.weight", "module.bias"]
