"""Averaged models of mmdet, MMPretrain and MMSelfSup beside the originals: equal to the bit."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.hooks.mmengine import CosineEMA, EMAHook, ExpMomentumEMA, InvertedCosineEMA
from tests.frameworks.hooks import mmengine_runs as runs
from tests.frameworks.hooks.ema_hooks import QUIET
from tests.frameworks.originals import original
from tests.networks import (
    CPU_BACKENDS,
    Weight,
    assert_equal_for,
    conv_net,
    floating,
    generator,
    snapshot,
    train,
)

# A momentum above 0.5 in either convention is what some of these are about.
pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:The value of momentum")]

_numbers = itertools.count()


class Average(NamedTuple):
    """One of ours, its name in mmengine's MODELS, and its original."""

    ours: Any
    registered: str
    theirs: Any


AVERAGES = {
    "mmpretrain": Average(
        CosineEMA,
        "FusedCosineEMA",
        original("mmpretrain==1.2.0", "mmpretrain.models.utils.ema").CosineEMA,
    ),
    "mmselfsup": Average(
        InvertedCosineEMA,
        "FusedInvertedCosineEMA",
        original("mmselfsup==1.0.0", "mmselfsup.models.utils.ema").CosineEMA,
    ),
    "mmdet": Average(
        ExpMomentumEMA,
        "FusedExpMomentumEMA",
        original("mmdet==3.3.0", "mmdet.models.layers.ema").ExpMomentumEMA,
    ),
}
# Arguments with which an average moves far in few steps, and the defaults.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "mmpretrain": [{}, {"momentum": 0.4, "end_momentum": 0.05}],
    "mmselfsup": [{}, {"momentum": 0.6, "end_momentum": 0.95}],
    "mmdet": [{}, {"momentum": 0.01, "gamma": 60}],
}
CASES = [
    pytest.param(kind, arguments, id=f"{kind}-{'other' if arguments else 'default'}")
    for kind in AVERAGES
    for arguments in ARGUMENTS[kind]
]
# The two conventions of the cosine, the weight of the source going from 0.004 to 0 in both.
COSINES = ["mmpretrain", "mmselfsup"]


def hub_of(max_iters: int | None) -> None:
    """A new message hub that is the current one, as a runner makes it; None: before training."""
    hub = MessageHub.get_instance(f"averaged_models_{next(_numbers)}")
    if max_iters is not None:
        hub.update_info("max_iters", max_iters)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_two_hundred_steps_are_equal_to_the_bit(
    kind: str,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    interval: int,
    update_buffers: bool,
    backend: str | None,
) -> None:
    hub_of(max_iters=200)
    model = conv_net(dtype=dtype)
    ours, _, theirs = AVERAGES[kind]
    arguments = {**arguments, "interval": interval, "update_buffers": update_buffers}
    their = theirs(model, **arguments)
    assert_equal_for(200, model, ours(model, **arguments, backend=backend), their)


@pytest.mark.parametrize("kind", AVERAGES)
def test_each_side_continues_from_the_other_side_s_state(kind: str) -> None:
    hub_of(max_iters=90)
    ours, _, theirs = AVERAGES[kind]
    arguments = ARGUMENTS[kind][1]
    model = conv_net()
    our, their = ours(model, **arguments), theirs(model, **arguments)
    assert list(our.state_dict()) == list(their.state_dict())
    assert_equal_for(30, model, our, their)
    our_next = ours(conv_net(seed=1), **arguments)
    their_next = theirs(conv_net(seed=1), **arguments)
    our_next.load_state_dict(their.state_dict(), strict=True)
    their_next.load_state_dict(our.state_dict(), strict=True)
    assert our_next.steps == their_next.steps == 30
    assert_equal_for(30, model, our_next, their_next, seed=2)


@pytest.mark.parametrize("kind", AVERAGES)
def test_arguments_have_the_original_s_order_and_defaults(kind: str) -> None:
    ours, _, theirs = AVERAGES[kind]
    positional = [0.3, 40 if kind == "mmdet" else 0.7, 2, None, True]
    names = ("momentum", "gamma", "end_momentum", "interval", "update_buffers")
    for arguments in ([], positional):
        our, their = ours(conv_net(), *arguments), theirs(conv_net(), *arguments)
        for name in names:
            assert getattr(our, name, None) == getattr(their, name, None)


@pytest.mark.parametrize("kind", AVERAGES)
def test_mmengine_builds_it_by_its_name(kind: str) -> None:
    ours, registered, _ = AVERAGES[kind]
    assert type(MODELS.build({"type": registered, "model": Weight()})) is ours


# The cosine, its momentum and its length.


def weights_of(average: Any, steps: list[int]) -> list[float]:
    """The weight of the source in the updates after so many steps: of 1 in an average of 0."""
    model = Weight(1.0)
    found = []
    for count in steps:
        average.module.weight.data.zero_()
        average.steps.fill_(count)
        average.update_parameters(model)
        found.append(average.module.weight.item())
    return found


@pytest.mark.parametrize("kind", COSINES)
def test_both_conventions_go_from_a_small_weight_of_the_source_to_none(kind: str) -> None:
    hub_of(max_iters=100)
    expected = [0.004 * (1 + math.cos(math.pi * step / 100)) / 2 for step in (1, 50, 99, 100)]
    found = weights_of(AVERAGES[kind].ours(Weight()), [1, 50, 99, 100])
    assert found == pytest.approx(expected, abs=1e-8)
    assert found[-1] == pytest.approx(0.0, abs=1e-15)  # the phase is a float32


@pytest.mark.parametrize("kind", COSINES)
def test_the_average_stays_at_its_end_where_the_original_comes_back(kind: str) -> None:
    hub_of(max_iters=10)
    ours, _, theirs = AVERAGES[kind]
    steps = [9, 10, 11, 20, 25]
    our, their = weights_of(ours(Weight()), steps), weights_of(theirs(Weight()), steps)
    assert our[:2] == their[:2]
    assert our[2:] == pytest.approx([0.0, 0.0, 0.0], abs=1e-15)
    assert their[2:] == pytest.approx([0.0000979, 0.004, 0.002], abs=1e-7)


@pytest.mark.parametrize("kind", COSINES)
def test_the_length_is_the_runner_s_unless_it_is_given(kind: str) -> None:
    ours, _, theirs = AVERAGES[kind]
    our, given, their = ours(Weight()), ours(Weight(), max_iters=40), theirs(Weight())
    for max_iters in (40, 1000):  # asked for at each update: it is known once training begins
        hub_of(max_iters)
        assert weights_of(our, [30]) == weights_of(their, [30])
    hub_of(40)
    at_forty = weights_of(their, [30])
    hub_of(1000)
    assert weights_of(given, [30]) == at_forty


@pytest.mark.parametrize("kind", COSINES)
def test_without_a_length_the_error_says_what_to_pass(kind: str) -> None:
    hub_of(max_iters=None)
    average = AVERAGES[kind].ours(Weight())
    average.update_parameters(Weight())  # the first call copies: no momentum is needed yet
    with pytest.raises(RuntimeError, match="max_iters="):
        average.update_parameters(Weight())


def test_weights_of_the_average_below_a_half_may_differ_in_the_last_bits_of_float64() -> None:
    """The weight of the source is exact where that of the average is a half or more."""
    hub_of(max_iters=200)
    model = conv_net(dtype=torch.float64)
    ours, _, theirs = AVERAGES["mmselfsup"]
    our, their = (kind(model, momentum=0.1, end_momentum=0.9) for kind in (ours, theirs))
    random = generator()
    for _ in range(200):
        train(model, random)
        our.update_parameters(model)
        their.update_parameters(model)
        for name, tensor in their.module.named_parameters():
            found = our.module.get_parameter(name)
            torch.testing.assert_close(found, tensor, rtol=4e-15, atol=4e-15)


def test_the_usual_momentum_of_each_convention_is_no_cause_for_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for average in AVERAGES.values():
            average.ours(Weight())
    with pytest.warns(UserWarning, match=r"0\.996"):
        CosineEMA(Weight(), momentum=0.996)


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.1, 1.5, math.nan])
@pytest.mark.parametrize("kind", AVERAGES)
def test_a_momentum_out_of_range_is_refused(kind: str, momentum: float) -> None:
    ours, _, theirs = AVERAGES[kind]
    with pytest.raises(AssertionError):
        theirs(Weight(), momentum=momentum)
    with pytest.raises(AssertionError, match=rf"momentum is {momentum}; a number in") as raised:
        ours(Weight(), momentum=momentum)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("end", [-0.1, 1.5, math.nan])
@pytest.mark.parametrize("kind", COSINES)
def test_an_end_out_of_range_is_refused_where_the_original_takes_it(kind: str, end: float) -> None:
    ours, _, theirs = AVERAGES[kind]
    theirs(Weight(), end_momentum=end)
    with pytest.raises(ValueError, match=rf"end_momentum is {end}; a number in \[0, 1\]"):
        ours(Weight(), end_momentum=end)


# In a runner: an algorithm that updates its target network in its forward pass, and EMAHook.


@MODELS.register_module()
class _TwoViews(BaseModel):  # type: ignore[misc]
    """An algorithm of the BYOL kind: the target is an average of two parts of the model."""

    def __init__(self, average: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.neck = nn.Linear(4, 7)
        self.head = nn.Linear(7, 7)
        self.target_net = MODELS.build({**average, "model": self.online()})

    def online(self) -> nn.Module:
        """Made anew at each call, as MMPretrain's and MMSelfSup's algorithms do."""
        return nn.Sequential(self.backbone, self.neck)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        if mode != "loss":
            return list(self.target_net(images))
        projected = self.head(self.neck(self.backbone(images)))
        with torch.no_grad():
            self.target_net.update_parameters(self.online())
            target = self.target_net(images.flip(-1))
        return {"loss": nn.functional.mse_loss(projected, target)}


def algorithm(average: Any, arguments: dict[str, Any]) -> Any:
    """The algorithm with an average that is given by its class or by its name."""
    return lambda: MODELS.build({"type": "_TwoViews", "average": {"type": average, **arguments}})


@pytest.mark.parametrize(
    "rest", [{}, {"interval": 3, "update_buffers": True}], ids=["parameters", "interval-buffers"]
)
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_algorithm_that_averages_in_its_forward_pass(
    kind: str, rest: dict[str, Any], tmp_path: Path
) -> None:
    ours, registered, theirs = AVERAGES[kind]
    arguments = {**ARGUMENTS[kind][1], **rest}
    whole = {"epochs": 4 if rest else 20, "save_interval": 2, "val_interval": 2}
    their = runs.trained(None, tmp_path / "a", model=algorithm(theirs, arguments), **whole)
    our = runs.trained(None, tmp_path / "b", model=algorithm(registered, arguments), **whole)
    assert type(our.model.target_net) is ours
    assert isinstance(their.model.target_net, theirs)
    if not rest:
        assert runs.differences(our.everything(), their.everything()) == []
        assert our.model.target_net.steps == 20 * runs.BATCHES
    # Integer buffers of an average with buffers: the original's count the target's own passes.
    assert our.metrics == their.metrics
    found, expected = snapshot(our.model), snapshot(their.model)
    assert runs.differences(floating(found), floating(expected)) == []


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_algorithm_is_resumed_from_the_original_s_checkpoint(kind: str, tmp_path: Path) -> None:
    _, registered, theirs = AVERAGES[kind]
    arguments = ARGUMENTS[kind][1]
    their = runs.trained(None, tmp_path / "a", model=algorithm(theirs, arguments), epochs=4)
    our = runs.trained(
        None,
        tmp_path / "b",
        model=algorithm(registered, arguments),
        epochs=4,
        load_from=tmp_path / "a" / "epoch_2.pth",
        resume=True,
    )
    assert runs.differences(snapshot(our.model), snapshot(their.model)) == []
    for name in ("state_dict", "optimizer"):
        found, expected = (run.checkpoint("epoch_4.pth")[name] for run in (our, their))
        assert runs.differences(found, expected) == []


@pytest.mark.parametrize("kind", AVERAGES)
def test_the_hook_averages_by_ours_where_the_original_s_class_is_asked_for(
    kind: str, tmp_path: Path
) -> None:
    ours, registered, theirs = AVERAGES[kind]
    arguments = ARGUMENTS[kind][1]
    their = runs.trained(
        {"type": "EMAHook", "ema_type": theirs, **arguments}, tmp_path / "a", epochs=4
    )
    for number, asked_for in enumerate((theirs, registered)):
        our = runs.trained(
            {"type": EMAHook, "ema_type": asked_for, **arguments},
            tmp_path / str(number),
            epochs=4,
        )
        assert type(our.hook().ema_model) is ours
        assert issubclass(ours, BaseAveragedModel)
        assert not isinstance(their.hook().ema_model, BaseAveragedModel)
        assert runs.differences(our.everything(), their.everything()) == []


@pytest.mark.parametrize("momentum", [0.0, 1.0, 1.5])
def test_the_inverted_cosine_explains_its_own_convention(momentum: Any) -> None:
    with pytest.raises(ValueError, match=r"momentum is .*; a number in \(0, 1\).*of the average"):
        InvertedCosineEMA(nn.Linear(1, 1), momentum)


def test_the_inverted_cosine_takes_a_small_weight_of_the_average_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaged = InvertedCosineEMA(nn.Linear(1, 1), 0.3, max_iters=10)
    assert averaged.momentum == 0.3
    assert averaged.momentum_at(0) == pytest.approx(0.7)
