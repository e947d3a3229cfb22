"""What our ``EMAHook`` refuses in mmengine's Runner, and what it says: name, found, expected."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

import ema_fused
from ema_fused.hooks import mmengine as ours
from tests.frameworks.hooks.ema_hooks import KINDS, OURS, QUIET, THEIRS
from tests.frameworks.hooks.mmengine_runs import BATCHES, build, differences, load, trained
from tests.networks import snapshot

pytestmark = QUIET

HOOK = {"type": OURS, **KINDS["ema"]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"begin_iter": 2, "begin_epoch": 3}, ValueError, "begin_iter is 2 and begin_epoch is 3;"),
        ({"begin_iter": -1}, ValueError, "begin_iter is -1; a finite number, 0 or more, is"),
        ({"begin_epoch": -2}, ValueError, "begin_epoch is -2; a finite number, 0 or more, is"),
        ({"begin_iter": True}, TypeError, "begin_iter is True; a finite number, 0 or more, is"),
        ({"begin_epoch": "3"}, TypeError, "begin_epoch is '3'; a finite number, 0 or more, is"),
        ({"ema_type": 5}, TypeError, "ema_type is 5; the name of an averaged model"),
        ({"ema_type": None}, TypeError, "ema_type is None; the name of an averaged model"),
    ],
    ids=str,
)
def test_arguments_are_checked_where_the_hook_is_made(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        ours.EMAHook(**arguments)
    assert isinstance(raised.value, AssertionError)  # as mmengine's


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"momentum": 0.0}, ValueError, "momentum is 0.0; a number in (0, 1) is expected"),
        ({"momentum": 1.0}, ValueError, "momentum is 1.0; a number in (0, 1) is expected"),
        ({"momentum": -0.1}, ValueError, "momentum is -0.1; a number in (0, 1) is expected"),
        ({"momentum": "0.1"}, TypeError, "momentum is '0.1'; a number in (0, 1) is expected"),
        ({"momentun": 0.1}, TypeError, "unexpected keyword argument 'momentun'"),
        ({"interval": 0}, ValueError, "interval is 0; at least 1 is expected"),
        (
            {"ema_type": "MomentumAnnealingEMA", "gamma": 0},
            ValueError,
            "gamma is 0; a finite number above 0 is expected",
        ),
        ({"ema_type": "Unheard"}, KeyError, "ema_type 'Unheard' is not registered in mmengine's"),
        ({"ema_type": "mmdte.ExpMomentumEMA"}, KeyError, "ema_type 'mmdte.ExpMomentumEMA' is not"),
        ({"ema_type": nn.Identity}, TypeError, "it makes is of the class Identity; an averaged"),
    ],
    ids=str,
)
def test_the_average_is_checked_before_the_run(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    run = build({"type": OURS, **arguments}, tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        run.train()
    assert run.runner.iter == 0


def test_an_ema_type_that_does_not_exist_is_told_of_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="ExponentialMovingAverage, MomentumAnnealingEMA, ExpMomen"):
        trained({"type": OURS, "ema_type": "Unheard"}, tmp_path)


@pytest.mark.parametrize(
    ("begin", "length", "message"),
    [
        ({"begin_iter": 16}, {"epochs": 3}, "begin_iter is 16 and the run ends after 15:"),
        ({"begin_epoch": 4}, {"epochs": 3}, "begin_epoch is 4 and the run ends after 3:"),
        ({"begin_iter": 10}, {"iters": 9}, "begin_iter is 10 and the run ends after 9:"),
    ],
    ids=str,
)
def test_a_beginning_after_the_end_is_refused(
    begin: dict[str, int], length: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="should be smaller than or equal to"):
        trained({"type": THEIRS, **begin}, tmp_path / "theirs", **length)
    with pytest.raises(AssertionError, match=re.escape(message)) as raised:
        trained({"type": OURS, **begin}, tmp_path / "ours", **length)
    assert isinstance(raised.value, ValueError)


# Checkpoints that don't match, with strict_load.


def drop(state: dict[str, Any], *names: str) -> None:
    for name in names:
        del state[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model, ema: drop(ema, "module.head.weight", "module.norm.running_var"),
            "its state_dict lacks nothing; its ema_state_dict lacks norm.running_var, head.weight",
        ),
        (
            lambda model, ema: drop(model, "conv.bias"),
            "its state_dict lacks conv.bias; its ema_state_dict lacks nothing",
        ),
        (
            lambda model, ema: ema.update({"module.aux": torch.ones(1)}),
            "its state_dict lacks aux; its ema_state_dict lacks nothing",
        ),
        (
            lambda model, ema: (drop(model, "head.bias"), drop(ema, "module.head.bias")),
            "its state_dict lacks head.bias; its ema_state_dict lacks head.bias",
        ),
        (
            lambda model, ema: drop(ema, *[name for name in ema if name != "steps"]),
            "conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var "
            "and 3 more",
        ),
    ],
    ids=["of-the-average", "of-the-model", "unknown", "of-both", "many"],
)
def test_names_that_differ_are_listed_and_nothing_is_loaded(
    change: Callable[[Any, Any], None], message: str, tmp_path: Path
) -> None:
    checkpoint = trained(HOOK, tmp_path, epochs=1, seed=5).checkpoint("epoch_1.pth")
    change(checkpoint["state_dict"], checkpoint["ema_state_dict"])
    torch.save(checkpoint, tmp_path / "changed.pth")
    strict = {**HOOK, "strict_load": True}
    run = build(strict, tmp_path / "strict", load_from=tmp_path / "changed.pth", resume=True)
    before = snapshot(run.model)
    with pytest.raises(KeyError, match=re.escape(message)):
        run.train()
    assert run.runner.iter == 0 and run.hook().ema_model.steps == 0
    # The average was made before the runner drew the model's weights.
    assert differences(before, snapshot(run.hook().ema_model.module)) == []


def test_names_that_differ_where_a_checkpoint_is_only_loaded_are_mmengines_error(
    tmp_path: Path,
) -> None:
    trained(None, tmp_path, epochs=1)
    checkpoint = load(tmp_path / "epoch_1.pth")
    del checkpoint["state_dict"]["head.bias"]
    torch.save(checkpoint, tmp_path / "changed.pth")
    for side in (THEIRS, OURS):
        hook = {"type": side, "strict_load": True}
        run = build(hook, tmp_path / side, load_from=tmp_path / "changed.pth")
        with pytest.raises(RuntimeError, match=r"missing keys in source state_dict: head\.bias"):
            run.train()


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_a_shape_that_differs_is_an_error_however_lenient(strict: bool, tmp_path: Path) -> None:
    checkpoint = trained(HOOK, tmp_path, epochs=1).checkpoint("epoch_1.pth")
    checkpoint["state_dict"]["head.weight"] = torch.zeros(7, 4)
    torch.save(checkpoint, tmp_path / "changed.pth")
    hook = {**HOOK, "strict_load": strict}
    run = build(hook, tmp_path / "run", load_from=tmp_path / "changed.pth", resume=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for module\.head\.weight"):
        run.train()


# Models that change their structure.


class Changes(Hook):  # type: ignore[misc]
    """Does something to the model in iteration 7, or behind the next evaluation's last batch."""

    def __init__(self, change: Callable[[nn.Module], None], when: str) -> None:
        self.change = change
        self.when = when

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter == 7 and self.when == "training":
            self.change(runner.model)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter == 7 and self.when == "saving":
            self.change(runner.model)
            runner.save_checkpoint(runner.work_dir, "changed.pth")

    def after_val_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        if runner.epoch == 2 and batch_idx == BATCHES - 1 and self.when == "evaluation":
            self.change(runner.model)


def add_a_layer(model: Any) -> None:
    model.aux = nn.Linear(1, 1, bias=False)


def remove_a_bias(model: Any) -> None:
    model.head.bias = None


def widen_the_head(model: Any) -> None:
    model.head = nn.Linear(4, 5)


@pytest.mark.parametrize(
    ("change", "when", "error", "message"),
    [
        (add_a_layer, "training", KeyError, "unexpected in the model: aux.weight"),
        (remove_a_bias, "training", KeyError, "head.bias"),
        (
            widen_the_head,
            "training",
            ValueError,
            "'head.weight' has shape (3, 4) in the average and (5, 4) in the model",
        ),
        (remove_a_bias, "saving", KeyError, "state lacks what its average has: head.bias;"),
        (remove_a_bias, "evaluation", RuntimeError, "can't be put back, because the model was"),
        (widen_the_head, "evaluation", RuntimeError, "'head.weight' has shape (3, 4) in the aver"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
@pytest.mark.parametrize("begin", [{}, {"begin_iter": 9}], ids=["averaging", "copying"])
def test_a_model_of_another_structure_is_refused(
    begin: dict[str, int],
    change: Callable[[Any], None],
    when: str,
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    further = {"type": Changes, "change": change, "when": when, "priority": "VERY_LOW"}
    run = build({**HOOK, **begin}, tmp_path, hooks=[further])
    with pytest.raises(error, match=re.escape(message)):
        run.train()
    assert not (tmp_path / "changed.pth").exists()


def test_what_makes_an_average_may_be_any_callable(tmp_path: Path) -> None:
    """As in mmengine: not a mistake."""
    made = functools.partial(ema_fused.ExponentialMovingAverage, momentum=0.07)
    run = trained({"type": OURS, "ema_type": made}, tmp_path / "partial")
    named = trained(HOOK, tmp_path / "named")
    assert differences(run.everything(), named.everything()) == []
