"""What each original makes of infinity and NaN, ours makes of them too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ema_pytorch
import pytest
import torch
import torch_ema
from diffusers import training_utils
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

from ema_fused.adapters import swa_utils as ours
from ema_fused.adapters.diffusers import EMAModel
from ema_fused.adapters.ema_pytorch import EMA
from ema_fused.adapters.torch_ema import ExponentialMovingAverage
from tests.frameworks.adapters.adapter_cases import timm_originals

INF, NAN = math.inf, math.nan
# Every pair of kinds of number: in the average, in the model.
BEFORE = torch.tensor([-INF] * 4 + [INF] * 4 + [NAN] * 4 + [1.0] * 4)
AFTER = torch.tensor([-INF, INF, NAN, 2.0] * 4)


class Masked(nn.Module):
    """A parameter and a buffer with these values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(BEFORE.clone())
        self.mask: Tensor
        self.register_buffer("mask", BEFORE.clone())

    @torch.no_grad()
    def change(self) -> None:
        for tensor in (self.weight, self.mask):
            tensor.copy_(AFTER)


def averaged(make: Callable[[Masked], Any], update: Callable[[Any, Masked], object]) -> list[float]:
    """The averages after the model was changed, twice."""
    model = Masked()
    average = make(model)
    values: list[float] = []
    update(average, model)
    for _ in range(2):
        model.change()
        update(average, model)
        held = getattr(average, "module", None) or getattr(average, "ema_model", None)
        tensors = average.shadow_params if held is None else held.state_dict().values()
        values += [number for tensor in tensors for number in tensor.tolist()]
    return values


def swa_utils(module: Any, **arguments: Any) -> list[float]:
    return averaged(
        lambda model: module.AveragedModel(model, use_buffers=True, **arguments),
        lambda average, model: average.update_parameters(model),
    )


def timm(kind: Any) -> list[float]:
    return averaged(lambda model: kind(model, 0.9), lambda average, model: average.update(model))


def of_parameters(kind: Any, **arguments: Any) -> list[float]:
    return averaged(
        lambda model: kind(list(model.parameters()), decay=0.9, **arguments),
        lambda average, model: average.step(list(model.parameters())),
    )


def of_torch_ema(kind: Any) -> list[float]:
    return averaged(
        lambda model: kind(list(model.parameters()), decay=0.9, use_num_updates=False),
        lambda average, model: average.update(list(model.parameters())),
    )


def of_ema_pytorch(kind: Any) -> list[float]:
    arguments = {"beta": 0.9, "update_every": 1, "update_after_step": 0}
    return averaged(lambda model: kind(model, **arguments), lambda average, _: average.update())


CASES: dict[str, Callable[[], tuple[list[float], list[float]]]] = {
    "get_ema_avg_fn": lambda: (
        swa_utils(ours, avg_fn=theirs.get_ema_avg_fn(0.9)),
        swa_utils(theirs, avg_fn=theirs.get_ema_avg_fn(0.9)),
    ),
    "get_ema_multi_avg_fn": lambda: (
        swa_utils(ours, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9)),
        swa_utils(theirs, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.9)),
    ),
    "get_swa_multi_avg_fn": lambda: (
        swa_utils(ours, multi_avg_fn=ours.get_swa_multi_avg_fn()),
        swa_utils(theirs, multi_avg_fn=theirs.get_swa_multi_avg_fn()),
    ),
    "diffusers": lambda: (of_parameters(EMAModel), of_parameters(training_utils.EMAModel)),
    "diffusers foreach": lambda: (
        of_parameters(EMAModel, foreach=True),
        of_parameters(training_utils.EMAModel, foreach=True),
    ),
    "torch-ema": lambda: (
        of_torch_ema(ExponentialMovingAverage),
        of_torch_ema(torch_ema.ExponentialMovingAverage),
    ),
    "ema-pytorch": lambda: (of_ema_pytorch(EMA), of_ema_pytorch(ema_pytorch.EMA)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_originals_numbers_are_kept(case: str) -> None:
    found, expected = CASES[case]()
    assert [str(number) for number in found] == [str(number) for number in expected]
    assert any(map(math.isnan, expected)) and any(map(math.isfinite, expected))


@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_timms_numbers_are_kept(name: str) -> None:
    try:
        their_module = timm_originals()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from ema_fused.adapters import timm as our_module

    found, expected = timm(getattr(our_module, name)), timm(getattr(their_module, name))
    assert [str(number) for number in found] == [str(number) for number in expected]


def test_the_default_mean_differs_at_the_first_average_alone_where_torchs_divides() -> None:
    found, expected = swa_utils(ours), swa_utils(theirs)
    pairs = list(zip(BEFORE.tolist(), AFTER.tolist(), strict=True)) * 2  # parameter and buffer
    first, later = (
        {
            pair
            for pair, one, other in zip(pairs, found[at:], expected[at:], strict=False)
            if str(one) != str(other)
        }
        for at in (0, len(pairs))
    )
    assert first == {(-INF, 2.0), (INF, 2.0), (1.0, -INF), (1.0, INF)}
    assert later == set()
