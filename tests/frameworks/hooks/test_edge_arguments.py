"""Every constructor that replaces an original, with values at the edges, beside the original.

What the original does with a value counts, not what it should do: where it runs and gives numbers,
ours gives the same ones; where it asserts, ours raises an AssertionError too; where it fails later,
ours says so at once. What is refused on purpose stands in ``REFUSED``.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook as MMEngineHook
from mmengine.logging import MessageHub
from mmengine.model import averaged_model
from torch import nn

from ema_fused.engine.checks import plain
from ema_fused.hooks import mmdet, mmengine, mmpretrain
from tests.frameworks.hooks.ema_hooks import COSINE, EXP, INVERTED, QUIET
from tests.frameworks.hooks.mmcv_runs import SIDES, assert_same, run, run_both
from tests.frameworks.originals import original

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings(
        "ignore:This overload of add_",
        "ignore:The value",
        "ignore:divide by zero",
        "ignore:Automatically set",
    ),
]

STEPS = 8
_numbers = itertools.count()
_MEAN_TEACHER = original("mmdet==3.3.0", "mmdet.engine.hooks.mean_teacher_hook").MeanTeacherHook
_PRETRAIN = original("mmpretrain==1.2.0", "mmpretrain.engine.hooks.ema_hook").EMAHook
MomentumUpdateHook = importlib.import_module("ema_fused.hooks.mmselfsup").MomentumUpdateHook
_MOMENTUM = original("mmselfsup==0.11.0", "mmselfsup.core.hooks.momentum_update_hook")


class Numbers(nn.Module):
    """A parameter and a buffer, of two numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))
        self.register_buffer("seen", torch.tensor([0.5, 4.0]))

    def step(self, number: int) -> None:
        """What the training of iteration ``number`` makes of it."""
        with torch.no_grad():
            self.weight.copy_(torch.tensor([1.0, -1.0]) * (1 + number * number))
            self.seen.mul_(1.5)


def a_runner(model: Any) -> Any:
    now = {"iter": 0, "epoch": 0, "_resume": False}
    logger = logging.getLogger("edges")
    return types.SimpleNamespace(model=model, max_iters=STEPS, max_epochs=4, logger=logger, **now)


# How each is used: gives the averages after every step.


def updated(make: Callable[..., Any]) -> list[list[float]]:
    """An averaged model."""
    MessageHub.get_instance(f"edges_{next(_numbers)}").update_info("max_iters", STEPS)
    model = Numbers()
    averaged = make(model)
    found = []
    for number in range(STEPS):
        model.step(number)
        averaged.update_parameters(model)
        found.append(averaged.module.weight.tolist())
    return found


def called_by_mmengine(make: Callable[..., Any]) -> list[list[float]]:
    hook, model = make(), Numbers()
    runner = a_runner(model)
    hook.before_run(runner)
    hook.before_train(runner)
    found = []
    for number in range(STEPS):
        runner.iter, runner.epoch = number, number // 2
        model.step(number)
        hook.after_train_iter(runner, number)
        found.append(hook.ema_model.module.weight.tolist())
    return found


def called_by_mmcv(make: Callable[..., Any], first: int = 0) -> list[list[float]]:
    hook, model = make(), Numbers()
    runner = a_runner(model)
    hook.before_run(runner)
    found = []
    for number in range(first, STEPS):
        runner.iter = number
        model.step(number)
        hook.after_train_iter(runner)
        found.append(model.get_buffer("ema_weight").tolist())
    return found


class TwoNetworks(nn.Module):
    """A teacher and a student, and an algorithm of the BYOL kind."""

    base_momentum, momentum = 0.6, 0.6

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = Numbers(), Numbers()

    def momentum_update(self) -> None:
        with torch.no_grad():
            weight, own = self.teacher.weight, self.student.weight
            weight.mul_(self.momentum).add_(own, alpha=1 - self.momentum)


def teaching(make: Callable[..., Any]) -> list[list[float]]:
    hook, model = make(), TwoNetworks()
    runner = a_runner(model)
    hook.before_train(runner)
    found = []
    for number in range(STEPS):
        runner.iter = number
        model.student.step(number)
        hook.after_train_iter(runner, number)
        found.append(model.teacher.weight.tolist())
    return found


def updating_momentum(make: Callable[..., Any]) -> list[list[float]]:
    hook, model = make(), TwoNetworks()
    runner = a_runner(types.SimpleNamespace(module=model, momentum_update=model.momentum_update))
    # Ours sees through wrappers that mmcv knows; this stands in for one on both sides.
    ours = a_runner(model)
    found = []
    for number in range(STEPS):
        runner.iter = ours.iter = number
        model.student.step(number)
        used = ours if isinstance(hook, MomentumUpdateHook) else runner
        hook.before_train_iter(used)
        hook.after_train_iter(used)
        found.append(model.teacher.weight.tolist())
    return found


class Replaced(NamedTuple):
    """An original, ours, how it is used, and the arguments that are tried beside ``usual``."""

    theirs: Any
    ours: Any
    use: Callable[[Callable[..., Any]], list[list[float]]]
    tried: tuple[str, ...]
    usual: dict[str, Any]


def _average(theirs: Any, ours: Any, *own: str) -> Replaced:
    usual = {"momentum": 0.3} if own else {}
    return Replaced(theirs, ours, updated, (*own, "interval", "update_buffers"), usual)


def _mmengine_hook(theirs: Any, ours: Any, *own: str) -> Replaced:
    tried = ("begin_iter", "begin_epoch", "strict_load", "momentum", "interval", *own)
    return Replaced(theirs, ours, called_by_mmengine, tried, {"momentum": 0.3})


def _mmcv_hook(name: str, *own: str) -> Replaced:
    tried = ("momentum", "interval", *own)
    usual = {"momentum": 0.3, "interval": 2 if name.startswith("Linear") else 1}
    return Replaced(
        getattr(SIDES["theirs"], name), getattr(SIDES["ours"], name), called_by_mmcv, tried, usual
    )


ALL = {
    "SWA": _average(averaged_model.StochasticWeightAverage, mmengine.StochasticWeightAverage),
    "EMA": _average(
        averaged_model.ExponentialMovingAverage, mmengine.ExponentialMovingAverage, "momentum"
    ),
    "annealing": _average(
        averaged_model.MomentumAnnealingEMA, mmengine.MomentumAnnealingEMA, "momentum", "gamma"
    ),
    "exp": _average(EXP, mmdet.ExpMomentumEMA, "momentum", "gamma"),
    "cosine": _average(COSINE, mmpretrain.CosineEMA, "momentum", "end_momentum"),
    "inverted": _average(INVERTED, mmengine.InvertedCosineEMA, "momentum", "end_momentum"),
    "mmengine-hook": _mmengine_hook(MMEngineHook, mmengine.EMAHook),
    "mmpretrain-hook": _mmengine_hook(
        _PRETRAIN, mmpretrain.EMAHook, "evaluate_on_ema", "evaluate_on_origin"
    ),
    "mmcv-hook": _mmcv_hook("EMAHook", "warm_up"),
    "base-hook": _mmcv_hook("BaseEMAHook", "skip_buffers", "momentum_fun"),
    "exp-hook": _mmcv_hook("ExpMomentumEMAHook", "total_iter"),
    "linear-hook": _mmcv_hook("LinearMomentumEMAHook", "warm_up"),
    "teacher": Replaced(
        _MEAN_TEACHER,
        mmdet.MeanTeacherHook,
        teaching,
        ("momentum", "interval", "skip_buffer"),
        {"momentum": 0.3},
    ),
    "momentum-hook": Replaced(
        _MOMENTUM.MomentumUpdateHook,
        MomentumUpdateHook,
        updating_momentum,
        ("end_momentum", "update_interval"),
        {},
    ),
}

VALUES: list[Any] = [
    *[0, 1, 2, 5, -1, -2, 0.0, 1.0, 2.0, 0.5, 2.5, -0.5, 0.9],
    *[None, True, False, math.nan, math.inf, "0.1", [1]],
    *[torch.tensor(0.1), torch.tensor(2), torch.tensor(2.0), torch.tensor([0.1, 0.2])],
    *[np.float32(0.25), np.float64(2.0), np.int64(2), np.int64(0), np.array(0.25)],
]
_FLAGS = ("update_buffers", "strict_load", "skip_buffers", "skip_buffer")
_FLAGS += ("evaluate_on_ema", "evaluate_on_origin")
FEWER: dict[str, list[Any]] = {name: [0, 1, None, True, False] for name in _FLAGS}
FEWER["momentum_fun"] = [0, 0.5, None, False, True, "x", lambda step: 0.1 + 0.05 * step]
# What an original runs with and ours refuses, because its numbers mean nothing, or nothing of what
# was asked for.
_INTERVALS = ("interval", "update_interval")
REFUSED: list[tuple[str, Callable[[str, float], bool]]] = [
    (
        "steps % 2.5 is 0 at every fifth step, steps % 0.0 never; a mean over them isn't one",
        lambda name, value: name in _INTERVALS and value % 1 != 0,
    ),
    (
        "steps % -1 is 0 at every step, and the mean divides by zero",
        lambda name, value: name == "interval" and value <= 0,
    ),
    (
        "the momentum leaves [0, 1] on its way, and the average runs away",
        lambda name, value: name == "end_momentum" and not 0 <= value <= 1,
    ),
    (
        "nothing is a step away then: constant, or a copy",
        lambda name, value: name in ("gamma", "total_iter", "warm_up") and not math.isfinite(value),
    ),
    (
        "a momentum below 0 or above 1 at first, or an overflow",
        lambda name, value: (
            (name == "warm_up" and value < 0) or (name == "total_iter" and value <= 0)
        ),
    ),
]


def is_refused(name: str, value: Any) -> bool:
    if isinstance(value, bool):  # a number in the wrong place
        return name not in FEWER
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return any(refuses(name, number) for _, refuses in REFUSED)


def is_taken(kind: str, name: str, value: Any) -> bool:
    """Whether ours takes what the original doesn't: a number of another type; no warm-up."""
    number = plain(value)
    if number is None:
        return False
    if kind == "mmcv-hook" and name == "warm_up" and number == 0:
        return True  # the original divides by 0 at iteration 0
    if kind == "mmcv-hook" and name == "interval":
        return type(value) is not int and number % 1 == 0 < number
    return isinstance(value, np.ndarray) and name not in _INTERVALS


def outcome(use: Callable[..., Any], make: Callable[..., Any]) -> Any:
    """The averages after every step, or the error."""
    try:
        return use(make)
    except Exception as error:
        return error


def made(replaced: Replaced, side: str, arguments: dict[str, Any]) -> Any:
    return lambda *model: getattr(replaced, side)(*model, **arguments)


CASES = [
    pytest.param(kind, name, value, id=f"{kind}-{name}-{getattr(value, '__name__', repr(value))}")
    for kind, replaced in ALL.items()
    for name in replaced.tried
    for value in FEWER.get(name, VALUES)
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_an_edge_value_does_what_it_does_in_the_original(kind: str, name: str, value: Any) -> None:
    replaced = ALL[kind]
    arguments = {**replaced.usual, name: value}
    their = outcome(replaced.use, made(replaced, "theirs", arguments))
    our = outcome(replaced.use, made(replaced, "ours", arguments))
    if isinstance(their, Exception) and is_taken(kind, name, value):
        plainly = made(replaced, "ours", {**arguments, name: plain(value)})
        assert our == outcome(replaced.use, plainly)
    elif isinstance(their, AssertionError):
        assert isinstance(our, AssertionError), our
        assert isinstance(our, (TypeError, ValueError))
        assert "expected" in str(our)
    elif isinstance(their, Exception) or is_refused(name, value):
        assert isinstance(our, (TypeError, ValueError)), our
        assert "expected" in str(our)
    else:
        assert isinstance(our, list), our
        np.testing.assert_allclose(our, their, rtol=3e-7 if _is_tensor(value) else 0)


def _is_tensor(value: Any) -> bool:
    """Then the originals compute the momentum in float32, where ours does in float64."""
    return isinstance(value, (torch.Tensor, np.ndarray, np.generic))


@pytest.mark.parametrize(
    "arguments",
    [{"warm_up": 0}, {"warm_up": 0.5, "interval": 2}, {"warm_up": 0, "interval": 3}],
    ids=str,
)
def test_without_a_warm_up_a_run_that_begins_later_is_equal_to_the_bit(
    arguments: dict[str, Any],
) -> None:
    """As where mmcv's hook resumes a checkpoint; at iteration 0 the original divides by 0."""
    theirs, ours = (SIDES[side].EMAHook for side in ("theirs", "ours"))

    def resumed(kind: Any) -> list[list[float]]:
        return called_by_mmcv(lambda: kind(momentum=0.5, **arguments), first=1)

    assert resumed(ours) == resumed(theirs)
    assert resumed(ours)[-1] != [1.0, -1.0]


def test_without_a_warm_up_the_first_iteration_has_the_momentum_itself() -> None:
    hook = SIDES["ours"].EMAHook(momentum=0.5, warm_up=0)
    with pytest.raises(ZeroDivisionError):
        called_by_mmcv(lambda: SIDES["theirs"].EMAHook(momentum=0.5, warm_up=0))
    assert [hook.momentum_fun(step) for step in (0, 1, 7)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("kind", ALL)
def test_a_number_of_another_type_is_kept_as_a_plain_one(kind: str) -> None:
    """So that states and representations stay plain, and no step asks a tensor for its value."""
    replaced = ALL[kind]
    kept = ("momentum", "gamma", "end_momentum", "interval", "update_interval", "warm_up")
    for name in replaced.tried:
        if name not in (*kept, "begin_iter", "begin_epoch"):
            continue
        value = 3 if "interval" in name or "begin" in name else 0.25
        for number in (
            torch.tensor(value),
            torch.tensor([value]),
            np.array(value),
            np.array([value]),
        ):
            arguments = [Numbers()] if replaced.use is updated else []
            hook = replaced.ours(*arguments, **{**replaced.usual, name: number})
            if kind.endswith(("mmengine-hook", "mmpretrain-hook")) and name in hook.ema_cfg:
                continue  # the average's, which is made later
            if kind == "mmcv-hook" and name == "interval":
                assert hook.momentum == 0.3**3
            found = getattr(hook, name, value)
            assert type(found) is type(value) and found == value, (name, number, found)


def test_without_a_warm_up_in_mmcv_s_own_runner(tmp_path: Path) -> None:
    run(SIDES["theirs"].EMAHook(momentum=0.5), epochs=1, work_dir=tmp_path)
    arguments = {"momentum": 0.5, "warm_up": 0, "resume_from": str(tmp_path / "epoch_1.pth")}
    assert_same(*run_both("EMAHook", arguments))
    arguments = {"momentum": 0.5, "warm_up": 0, "interval": 2}
    assert_same(*run_both("LinearMomentumEMAHook", arguments), stale_integers=True)


@pytest.mark.parametrize("side", ["theirs", "ours"])
def test_a_model_without_what_the_hook_needs_fails_an_assertion(side: str) -> None:
    model: Any = nn.Linear(1, 1)
    wrapped = types.SimpleNamespace(module=model) if side == "theirs" else model
    with pytest.raises(AssertionError, match="momentum"):
        made(ALL["momentum-hook"], side, {})().before_train_iter(a_runner(wrapped))
    with pytest.raises(AssertionError):
        made(ALL["teacher"], side, {})().before_train(a_runner(model))
