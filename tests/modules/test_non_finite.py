"""Averaged buffers that hold infinity or NaN stay what the model has there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import (
    AveragedWeights,
    CosineEMA,
    ExpMomentumEMA,
    ExponentialMovingAverage,
    StochasticWeightAverage,
)
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.engine import backends
from ema_fused.modules import planned_pairs
from tests.networks import CPU_BACKENDS, conv_net, differences, generator, snapshot, train

INF, NAN = math.inf, math.nan
# All that can meet, beside pairs of finite elements: in the average, in the model.
BEFORE = torch.tensor([-INF, INF, INF, -INF, NAN, NAN, 1.0, 1.0, 1.0, INF, 1.0, 0.25])
AFTER = torch.tensor([-INF, INF, -INF, INF, NAN, 1.0, NAN, INF, -INF, 1.0, 2.0, 0.75])


class OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


class Masked(nn.Module):
    """Batch norm, whose statistics are averaged, beside a buffer that isn't finite."""

    def __init__(self, mask: Tensor = BEFORE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.mask: Tensor
        self.register_buffer("mask", mask.clone())


KINDS = {
    "exponential": lambda model, **options: ExponentialMovingAverage(model, 0.1, **options),
    "mean": StochasticWeightAverage,
    "axpby": ExpMomentumEMA,
    "cosine": lambda model, **options: CosineEMA(model, max_iters=50, **options),
    "weights": lambda model, **options: AveragedWeights(model, 0.1, **options),
    "one by one": OneByOne,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"averaged_dtype": torch.float64},
    {"distance_every": 1},
    {"rounding": "stochastic"},
    {"offload": "cpu"},
    {"capturable": True},
    *({"backend": name} for name in CPU_BACKENDS if name),
]


@pytest.mark.filterwarnings("ignore:update_parameters\\(\\) waits until")
@pytest.mark.parametrize(
    "made, options",
    [
        pytest.param(made, options, id=f"{made}-{options}")
        for made in KINDS
        for options in OPTIONS
        # Not all are options of these.
        if made not in ("one by one", "cosine") or options.keys() <= {"backend", "averaged_dtype"}
    ],
)
def test_only_what_is_finite_is_averaged(made: str, options: dict[str, Any]) -> None:
    model, plain = Masked(), Masked(BEFORE.nan_to_num(0.5, 0.5, 0.5))
    averages = [KINDS[made](one, update_buffers=True, **options) for one in (model, plain)]
    random = [generator(), generator()]
    for after in (BEFORE, AFTER, AFTER):
        for one, average, numbers in zip((model, plain), averages, random, strict=True):
            train(one, numbers)
            one.mask.copy_(after if one is model else after.nan_to_num(0.5, 0.5, 0.5))
            average.update_parameters(one)
            average.flush()
    ours, other = (average.module.state_dict() for average in averages)
    finite = BEFORE.isfinite() & AFTER.isfinite()
    assert torch.equal(ours["mask"][finite], other["mask"][finite])
    assert not torch.equal(ours["mask"][finite].float(), AFTER[finite])
    torch.testing.assert_close(
        ours["mask"][~finite].float(), AFTER[~finite], rtol=0, atol=0, equal_nan=True
    )
    del ours["mask"], other["mask"]
    assert differences(ours, other) == []  # to the bit as if the mask weren't there
    if "distance_every" in options:
        assert averages[0].distance is not None
        assert math.isfinite(averages[0].distance.value)


def test_a_skipped_step_leaves_them_alone() -> None:
    model = Masked()
    average = ExponentialMovingAverage(model, 0.1, update_buffers=True)
    average.update_parameters(model)
    model.mask.copy_(AFTER)
    before = snapshot(average)
    average.update_parameters(model, found_inf=torch.ones(1))
    for name, value in average.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    average.update_parameters(model, found_inf=torch.zeros(1))
    assert average.module.mask[9] == 1.0  # type: ignore[index]


def test_a_step_between_two_averages_leaves_them_alone() -> None:
    model = Masked()
    average = ExponentialMovingAverage(model, 0.1, interval=2, update_buffers=True)
    average.update_parameters(model)
    model.mask.copy_(AFTER)
    average.update_parameters(model)
    assert torch.equal(average.module.mask.nan_to_num(7.0), BEFORE.nan_to_num(7.0))  # type: ignore[operator, union-attr]
    average.update_parameters(model)
    assert average.module.mask[0] == -INF  # type: ignore[index]


@pytest.mark.parametrize("change", ["converted", "replaced", "resumed"])
def test_they_are_looked_for_whenever_tensors_are_paired(change: str) -> None:
    model = Masked(torch.zeros(12))
    average = ExponentialMovingAverage(model, 0.1, update_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    if change == "converted":
        model.mask.copy_(BEFORE)
        average.module.mask.copy_(BEFORE)  # type: ignore[operator, union-attr]
        model.double()
    elif change == "replaced":
        model.mask = BEFORE.clone()
        average.module.mask = BEFORE.clone()
    else:
        state = average.state_dict()
        state["module.mask"] = BEFORE.clone()
        model.mask.copy_(BEFORE)
        average = ExponentialMovingAverage(model, 0.1, update_buffers=True)
        average.load_state_dict(state)
    for _ in range(3):
        average.update_parameters(model)
    assert torch.equal(average.module.mask[:4].float(), BEFORE[:4])  # type: ignore[index]


def test_an_observer_s_range_is_averaged_from_its_first_batch_on() -> None:
    """It is (inf, -inf) when the average is made, and finite when it is first updated."""
    model = Masked(torch.tensor([INF, -INF]))
    average = ExponentialMovingAverage(model, 0.5, update_buffers=True)
    model.mask.copy_(torch.tensor([-1.0, 1.0]))
    average.update_parameters(model)
    model.mask.copy_(torch.tensor([-3.0, 3.0]))
    average.update_parameters(model)
    assert average.module.mask.tolist() == [-2.0, 2.0]  # type: ignore[operator, union-attr]
    assert average._pairing is not None
    if backends.why_not("cpu") is None:
        assert average._pairing._planned.compiled is not None  # as fast as any other buffer


def test_finite_buffers_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = planned_pairs.those_non_finite

    def counted(pairs: Any) -> Any:
        seen.append(len(pairs))
        return real(pairs)

    monkeypatch.setattr(planned_pairs, "those_non_finite", counted)
    model, random = conv_net(), generator()
    average = ExponentialMovingAverage(model, 0.1, update_buffers=True, begin_step=3)
    for _ in range(8):
        train(model, random)
        average.update_parameters(model)
    assert seen == [3]  # mean, variance and scale
    followed = ExponentialMovingAverage(model, 0.1)
    for _ in range(3):
        followed.update_parameters(model)
    assert seen == [3]  # copied buffers aren't looked at


def test_parameters_are_averaged_as_torch_does() -> None:
    model = Masked()
    with torch.no_grad():
        model.layer.bias.fill_(-INF)
    average = ExponentialMovingAverage(model, 0.1, update_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    expected = torch.full((4,), -INF).lerp_(torch.full((4,), -INF), 0.1)
    bias = average.module.layer.bias  # type: ignore[union-attr]
    assert bias.isnan().tolist() == expected.isnan().tolist() == [True] * 4  # type: ignore[operator, union-attr]


def test_a_buffer_that_changes_its_shape_is_named_and_nothing_is_averaged() -> None:
    model = Masked()
    average = ExponentialMovingAverage(model, 0.1, update_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    before = snapshot(average)
    model.mask.data = torch.zeros(5)
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"'mask' has shape \(12,\) in the average and \(5,\)"):
        average.update_parameters(model)
    for name, value in average.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
