"""Our ``EMAHook`` beside mmengine's own in mmengine's Runner: the same to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import nn

from ema_fused.modules import exchanging
from tests.frameworks.hooks.ema_hooks import (
    KINDS,
    LOOPS,
    OURS,
    QUIET,
    THEIRS,
    trained_both,
    unequal,
    without_integers,
)
from tests.frameworks.hooks.mmengine_runs import BATCHES, Run, build, differences, trained
from tests.networks import snapshot

pytestmark = QUIET


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_equal_to_the_bit(
    kind: str, interval: int, update_buffers: bool, loop: str, tmp_path: Path
) -> None:
    hook = {**KINDS[kind], "interval": interval, "update_buffers": update_buffers}
    their_run, our_run = trained_both(tmp_path, hook, **LOOPS[loop])
    found = unequal(their_run, our_run)
    if update_buffers:
        found = without_integers(found)
    assert found == []
    assert our_run.hook().ema_model.steps == 20
    # Otherwise the above would hold of two hooks that do nothing.
    average = our_run.hook().ema_model.module.state_dict()
    assert "/head.weight" in differences(dict(our_run.model.state_dict()), dict(average))


@pytest.mark.parametrize("kind", ["ema", "annealing"])
def test_two_hundred_iterations_are_equal_to_the_bit(kind: str, tmp_path: Path) -> None:
    both = trained_both(tmp_path, KINDS[kind], epochs=40, val_interval=4, save_interval=10)
    assert unequal(*both) == []
    assert len(both[1].metrics) == 10


@pytest.mark.parametrize(
    "begin",
    [{"begin_iter": step} for step in (1, 2, 13, 20)] + [{"begin_epoch": n} for n in (1, 3, 4)],
    ids=str,
)
@pytest.mark.parametrize("interval", [1, 3])
def test_averaging_begins_at_the_same_step(
    begin: dict[str, int], interval: int, tmp_path: Path
) -> None:
    hook = {**KINDS["annealing"], "interval": interval, **begin}
    both = trained_both(tmp_path, hook, epochs=4)
    assert unequal(*both) == []
    first = begin.get("begin_iter", (begin.get("begin_epoch", 1) - 1) * BATCHES + 1)
    assert both[1].hook().ema_model.steps == 20 - (first - 1)


@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
def test_iterations_of_the_loop_without_epochs_begin_at_the_same_step(
    update_buffers: bool, tmp_path: Path
) -> None:
    hook = {**KINDS["ema"], "begin_iter": 8, "update_buffers": update_buffers}
    both = trained_both(tmp_path, hook, iters=20, val_interval=3, save_interval=7)
    assert (without_integers if update_buffers else list)(unequal(*both)) == []
    assert both[1].hook().ema_model.steps == 13


def test_the_defaults_are_equal_to_the_bit(tmp_path: Path) -> None:
    assert unequal(*trained_both(tmp_path, {}, epochs=4)) == []


def test_a_test_within_a_run_is_of_the_averages(tmp_path: Path) -> None:
    both = trained_both(tmp_path, KINDS["ema"], epochs=2)
    for run in both:
        before = snapshot(run.model)
        run.runner.test_loop.run()
        assert differences(snapshot(run.model), before) == []
        assert run.metrics[2] == run.metrics[1]  # of the last validation, with the same data
    assert unequal(*both) == []


def test_a_test_after_a_training_in_one_process_gives_the_same_metrics(tmp_path: Path) -> None:
    """Of the model's own weights: each run begins with a new average, in mmengine too."""
    both = [run.test() for run in trained_both(tmp_path, KINDS["ema"], epochs=2)]
    assert unequal(*both) == []
    assert len(both[1].metrics) == 3


def test_a_loaded_checkpoint_is_tested_and_validated_with_its_averages(tmp_path: Path) -> None:
    files = [run.folder / "epoch_2.pth" for run in trained_both(tmp_path, KINDS["ema"], epochs=2)]
    averages = trained({"type": OURS, **KINDS["ema"]}, tmp_path / "again", epochs=2).metrics[-1]
    for loop in (Run.test, Run.val):
        for number, (kind, file) in enumerate(zip((THEIRS, OURS), files, strict=True)):
            hook = {"type": kind, **KINDS["ema"]}
            run = build(hook, tmp_path / f"{loop.__name__}_{number}", load_from=file)
            assert loop(run).metrics == [averages]


# What happens to the model's tensors.


class Addresses(Hook):  # type: ignore[misc]
    """Notes where the parameters are, in training, in the middle of evaluations, and after them."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.noted: dict[str, set[tuple[int, ...]]] = {}
        self.values: dict[str, Any] = {}

    def note(self, when: str, runner: Runner) -> None:
        addresses = tuple(parameter.data_ptr() for parameter in runner.model.parameters())
        self.noted.setdefault(when, set()).add(addresses)
        self.values[when] = snapshot(runner.model)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self.note("training", runner)

    def after_val_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self.note("evaluation", runner)

    def after_val_epoch(self, runner: Runner, *_: Any, **__: Any) -> None:
        self.note("after it", runner)


def test_averages_are_swapped_in_place_and_planned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairings = []
    pair_up = exchanging.pair_up
    monkeypatch.setattr(
        exchanging, "pair_up", lambda *a, **b: pairings.append(a) or pair_up(*a, **b)
    )
    hook = {"type": OURS, **KINDS["ema"]}
    run = trained(hook, tmp_path, epochs=4, hooks=[{"type": Addresses}])
    found = run.hook(Addresses)
    (address,) = found.noted["training"]
    assert found.noted == {when: {address} for when in ("training", "evaluation", "after it")}
    assert differences(found.values["training"], found.values["after it"]) == []
    average = snapshot(run.hook().ema_model.module)
    assert differences(found.values["evaluation"], average) == []
    assert differences(found.values["training"], average) != []
    assert len(run.metrics) == 4 and len(pairings) == 1


class Replaces(Hook):  # type: ignore[misc]
    """Replaces tensors of the model in the middle of an epoch, as some training schemes do."""

    def __init__(self, how: str) -> None:
        self.how = how

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter != 8:
            return
        model = runner.model
        hooks = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        if self.how == "parameter":
            was, new = model.head.weight, nn.Parameter(model.head.weight * 1.5)
            model.head.weight = new
            optimizer = runner.optim_wrapper.optimizer
            (group,) = optimizer.param_groups
            group["params"] = [new if other is was else other for other in group["params"]]
            optimizer.state[new] = optimizer.state.pop(was)
        elif self.how == "data":
            model.head.weight.data = model.head.weight.data * 1.5
        elif self.how == "buffer":
            model.norm.running_mean = model.norm.running_mean + 1.0
        elif self.how == "both in double":
            model.double()
            hooks[0].ema_model.double()
        elif self.how == "average's data":
            for parameter in hooks[0].ema_model.parameters():
                parameter.data = parameter.data + 1.0


@pytest.mark.parametrize("how", ["parameter", "data", "buffer", "both in double", "average's data"])
@pytest.mark.parametrize("interval", [1, 3])
def test_replaced_tensors_are_followed_to_the_bit(how: str, interval: int, tmp_path: Path) -> None:
    hook = {**KINDS["ema"], "interval": interval}
    further = [{"type": Replaces, "how": how}, {"type": Addresses}]
    both = trained_both(tmp_path, hook, epochs=4, hooks=further)
    assert unequal(*both) == []
    found = both[1].hook(Addresses).values
    assert differences(found["training"], found["after it"]) == []
    assert differences(found["evaluation"], snapshot(both[1].hook().ema_model.module)) == []


class SetsStatistics(Hook):  # type: ignore[misc]
    """Changes the statistics between training and evaluation, as precise batch norm does."""

    def after_train_epoch(self, runner: Runner) -> None:
        runner.model.norm.running_mean.add_(0.5)


@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
def test_buffers_that_are_not_averaged_are_evaluated_as_the_model_has_them(
    update_buffers: bool, tmp_path: Path
) -> None:
    hook = {**KINDS["ema"], "update_buffers": update_buffers}
    arguments = {"epochs": 1, "save_interval": 2}
    both = trained_both(tmp_path, hook, hooks=[{"type": SetsStatistics}], **arguments)
    assert both[0].metrics == both[1].metrics
    usual = trained({"type": OURS, **hook}, tmp_path / "usual", **arguments)
    assert (both[1].metrics == usual.metrics) == update_buffers


def test_a_hook_that_has_run_can_be_copied_with_its_average(tmp_path: Path) -> None:
    hook = trained({"type": OURS, **KINDS["ema"]}, tmp_path, epochs=2).hook()
    copied = copy.deepcopy(hook)
    assert differences(copied.ema_model.state_dict(), hook.ema_model.state_dict()) == []
    hook.before_val_epoch(None)
    with pytest.raises(RuntimeError, match="copied or pickled during an evaluation"):
        copy.deepcopy(hook)
    hook.after_val_epoch(None)
