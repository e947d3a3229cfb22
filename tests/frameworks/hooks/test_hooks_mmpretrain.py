"""MMPretrain's ``EMAHook`` beside ours: equal to the bit, but for what is better."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.hooks import mmengine
from ema_fused.hooks.mmpretrain import EMAHook
from tests import processes
from tests.frameworks.hooks import mmengine_runs as runs
from tests.frameworks.hooks.ema_hooks import QUIET, without_integers
from tests.frameworks.originals import original
from tests.networks import snapshot

Theirs = original("mmpretrain==1.2.0", "mmpretrain.engine.hooks.ema_hook").EMAHook
HOOKS = {"theirs": Theirs, "ours": "FusedMMPretrainEMAHook"}  # its name in mmengine's HOOKS

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:Automatically set"),
]

AVERAGE = {"ema_type": "MomentumAnnealingEMA", "momentum": 0.05, "gamma": 9}
LOOPS: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 4, "save_interval": 2},
    "iterations": {"iters": 20, "val_interval": 5, "save_interval": 10},
}
FLAGS = [
    pytest.param({"evaluate_on_ema": ema, "evaluate_on_origin": origin}, id=f"{ema}-{origin}")
    for ema in (True, False)
    for origin in (True, False)
]


def both(folder: Path, hook: dict[str, Any], **arguments: Any) -> tuple[runs.Run, runs.Run]:
    """The original's run and ours."""
    config = {**AVERAGE, **hook}
    their, our = runs.side_by_side(
        {"type": Theirs, **config}, {"type": HOOKS["ours"], **config}, folder, **arguments
    )
    assert type(our.hook()) is EMAHook
    assert isinstance(our.hook().ema_model, BaseAveragedModel)
    return their, our


def unequal(their: runs.Run, our: runs.Run) -> list[str]:
    return runs.differences(their.everything(), our.everything())


def scalars(run: runs.Run) -> dict[str, list[float]]:
    """What was noted in the message hub of the metrics: by name, from first to last."""
    found = run.runner.message_hub.log_scalars.items()
    return {name: list(scalar.data[0]) for name, scalar in found if "logits" in name}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("flags", FLAGS)
def test_what_is_evaluated_is_equal_to_the_bit(
    flags: dict[str, bool], loop: str, tmp_path: Path
) -> None:
    their, our = both(tmp_path, flags, **LOOPS[loop])
    assert unequal(their, our) == []
    found = scalars(our)
    assert found == scalars(their)
    assert len(found["val/logits/sum"]) == 4
    assert ("val/logits/sum_origin" in found) is all(flags.values())


def test_evaluations_are_those_of_the_weights_that_were_asked_for(tmp_path: Path) -> None:
    """Otherwise the test above would hold of two hooks that evaluate anything twice."""
    found = {}
    for name, ema, origin in (("both", 1, 1), ("average", 1, 0), ("model", 0, 1), ("none", 0, 0)):
        hook = {"evaluate_on_ema": bool(ema), "evaluate_on_origin": bool(origin)}
        config = {"type": HOOKS["ours"], **AVERAGE, **hook}
        found[name] = scalars(runs.trained(config, tmp_path / name))
    name = "val/logits/sum"
    assert found["both"][name] == found["average"][name]
    assert found["both"][f"{name}_origin"] == found["model"][name] == found["none"][name]
    for averaged, own in zip(found["average"][name], found["model"][name], strict=True):
        assert averaged != own


def test_a_hundred_iterations_with_both_evaluations_are_equal_to_the_bit(tmp_path: Path) -> None:
    flags = {"evaluate_on_ema": True, "evaluate_on_origin": True}
    their, our = both(tmp_path, flags, epochs=24, val_interval=6, save_interval=8)
    assert our.hook().ema_model.steps == 120
    assert unequal(their, our) == []
    assert len(scalars(our)["val/logits/squares_origin"]) == 4


@pytest.mark.parametrize(
    "hook",
    [
        {},
        {"begin_epoch": 3},
        {"begin_iter": 7, "interval": 2},
        {"update_buffers": True, "evaluate_on_origin": True},
        {"ema_type": "StochasticWeightAverage", "momentum": None, "gamma": None},
    ],
    ids=["plain", "begin_epoch", "begin_iter", "buffers-too", "swa"],
)
def test_the_arguments_of_mmengine_s_hook_act_as_in_the_original(
    hook: dict[str, Any], tmp_path: Path
) -> None:
    config = {name: value for name, value in {**AVERAGE, **hook}.items() if value is not None}
    their, our = runs.side_by_side(
        {"type": Theirs, **config}, {"type": EMAHook, **config}, tmp_path, epochs=4
    )
    found = unequal(their, our)
    assert (without_integers(found) if "update_buffers" in hook else found) == []


@pytest.mark.parametrize("flags", FLAGS)
def test_a_test_of_a_checkpoint_gives_the_same_metrics(
    flags: dict[str, bool], tmp_path: Path
) -> None:
    saved = runs.trained({"type": HOOKS["ours"], **AVERAGE}, tmp_path / "saved", epochs=2)
    their, our = (
        runs.build(
            {"type": kind, **AVERAGE, **flags},
            tmp_path / name,
            load_from=saved.folder / "epoch_2.pth",
        ).test()
        for name, kind in HOOKS.items()
    )
    assert their.metrics
    assert unequal(their, our) == []
    found = scalars(our)
    assert found == scalars(their)
    assert ("test/logits/sum_origin" in found) is all(flags.values())
    state = saved.checkpoint("epoch_2.pth")["ema_state_dict"]  # the model's own weights
    assert torch.equal(our.model.head.weight, state["module.head.weight"])


# Checkpoints.


@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("saved_by", HOOKS)
@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "loaded"])
def test_checkpoints_go_both_ways(
    resume: bool, saved_by: str, update_buffers: bool, tmp_path: Path
) -> None:
    hook = {**AVERAGE, "update_buffers": update_buffers, "evaluate_on_origin": True}
    saved = runs.trained({"type": HOOKS[saved_by], **hook}, tmp_path / "saved", epochs=2)
    rest = {"epochs": 4, "load_from": saved.folder / "epoch_2.pth", "resume": resume}
    their, our = both(tmp_path, hook, **rest)
    assert our.hook().ema_model.steps == (20 if resume else 30)
    found = unequal(their, our)
    assert (without_integers(found) if update_buffers else found) == []


def test_a_run_resumed_in_a_new_process_is_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    hook = {"type": HOOKS["ours"], **AVERAGE, "update_buffers": True, "evaluate_on_origin": True}
    whole = runs.trained(hook, tmp_path / "whole", epochs=4)
    code = f"""
import sys
from pathlib import Path
import ema_fused.hooks.mmpretrain
from tests.frameworks.hooks import mmengine_runs

mmengine_runs.trained(
    {hook!r}, Path(sys.argv[1]), epochs=4, load_from=Path(sys.argv[2]), resume=True
)
"""
    processes.run_fork(
        "mmengine.runner", "-c", code, tmp_path / "rest", whole.folder / "epoch_2.pth"
    )
    runs.assert_same_rest(tmp_path / "rest", whole.folder)


def loaded(kind: Any, file: Path, folder: Path, **arguments: Any) -> runs.Run:
    """A run that has loaded a checkpoint, not resuming, and is about to train."""
    hook = {"type": kind, **AVERAGE}
    return runs.broken_off(hook, folder, 0, load_from=file, **arguments)


@pytest.mark.parametrize("saved_by", HOOKS)
def test_loading_gives_the_average_to_the_model_and_its_steps_to_the_average(
    saved_by: str, tmp_path: Path
) -> None:
    saved = runs.trained({"type": HOOKS[saved_by], **AVERAGE}, tmp_path / "saved", epochs=2)
    file = saved.folder / "epoch_2.pth"
    average, own = (saved.checkpoint("epoch_2.pth")[k] for k in ("state_dict", "ema_state_dict"))
    for name, kind in {"theirs": Theirs, "ours": EMAHook}.items():
        run = loaded(kind, file, tmp_path / name)
        assert run.hook().ema_model.steps == 10
        assert runs.differences(dict(run.model.state_dict()), dict(average)) == []
        copy = run.hook().ema_model.module.state_dict()
        assert runs.differences(dict(copy), dict(average)) == []
    assert not torch.equal(own["module.head.weight"], average["head.weight"])


def test_a_checkpoint_without_an_average_is_one_of_the_model(tmp_path: Path) -> None:
    saved = runs.trained(None, tmp_path / "saved", epochs=2)
    for resume in (True, False):
        rest = {"epochs": 4, "load_from": saved.folder / "epoch_2.pth", "resume": resume}
        their, our = both(tmp_path / str(resume), {"evaluate_on_origin": True}, **rest)
        assert our.hook().ema_model.steps == (10 if resume else 20)
        assert unequal(their, our) == []


def test_mmengine_s_checkpoints_and_ours_are_the_same(tmp_path: Path) -> None:
    """The choice of what is evaluated is in no checkpoint: either hook resumes the other's."""
    saved = runs.trained({"type": "FusedEMAHook", **AVERAGE}, tmp_path / "saved", epochs=4)
    rest = {"epochs": 4, "load_from": saved.folder / "epoch_2.pth", "resume": True}
    their, our = both(tmp_path, {}, **rest)
    assert unequal(their, our) == []
    assert issubclass(EMAHook, mmengine.EMAHook)
    found, expected = (run.checkpoint("epoch_4.pth") for run in (our, saved))
    for name in ("state_dict", "ema_state_dict", "optimizer"):
        assert runs.differences(dict(found[name]), dict(expected[name])) == []


class _Finetuned(runs.Net):
    """The network with a layer that no checkpoint of it has."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Linear(3, 3)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        logits = self.added(torch.stack(super().forward(images, labels, "predict")))
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(logits, labels)}
        return list(logits)


def initial_weights(folder: Path) -> tuple[Tensor, Tensor]:
    """Of the layer that is added: before and after ``init_weights``."""
    run = runs.build(None, folder, model=_Finetuned)
    before = run.model.added.weight.clone()
    run.runner._init_model_weights()
    assert not torch.equal(before, run.model.added.weight)
    return before, run.model.added.weight


def test_a_model_keeps_its_weights_where_no_average_is_loaded(tmp_path: Path) -> None:
    saved = runs.trained(None, tmp_path / "saved", epochs=1)
    _, initial = initial_weights(tmp_path)
    for name, kind in {"theirs": Theirs, "ours": EMAHook}.items():
        run = loaded(kind, saved.folder / "epoch_1.pth", tmp_path / name, model=_Finetuned)
        assert torch.equal(run.model.added.weight, initial)


# What is different on purpose: first the original's behaviour, then ours.


def test_a_layer_that_the_checkpoint_lacks_keeps_its_weights_where_the_original_loses_them(
    tmp_path: Path,
) -> None:
    """The original gives the model what the average was made with: before ``init_weights``."""
    saved = runs.trained({"type": HOOKS["ours"], **AVERAGE}, tmp_path / "saved", epochs=2)
    file = saved.folder / "epoch_2.pth"
    before, initial = initial_weights(tmp_path)
    for kind, expected in ((Theirs, before), (EMAHook, initial)):
        run = loaded(kind, file, tmp_path / kind.__module__, model=_Finetuned)
        assert torch.equal(run.model.added.weight, expected)
        assert torch.equal(run.hook().ema_model.module.added.weight, expected)
    assert any("ema_state_dict lacks added.weight" in message for message in run.messages)


def test_averaged_buffers_are_loaded_too_where_the_original_takes_the_model_s_own(
    tmp_path: Path,
) -> None:
    """A hook that averages no buffers, and a checkpoint of one that does."""
    hook = {"type": HOOKS["ours"], **AVERAGE, "update_buffers": True}
    saved = runs.trained(hook, tmp_path / "saved", epochs=2)
    average, own = (saved.checkpoint("epoch_2.pth")[k] for k in ("state_dict", "ema_state_dict"))
    name = "norm.running_mean"
    for kind, expected in ((Theirs, own[f"module.{name}"]), (EMAHook, average[name])):
        run = loaded(kind, saved.folder / "epoch_2.pth", tmp_path / kind.__module__)
        assert torch.equal(run.model.norm.weight, average["norm.weight"])
        assert torch.equal(run.model.norm.running_mean, expected)
    assert not torch.equal(own[f"module.{name}"], average[name])


# Arguments.


def test_where_nothing_is_to_be_evaluated_the_model_is_with_a_warning() -> None:
    nothing = {"evaluate_on_ema": False, "evaluate_on_origin": False}
    with pytest.warns(UserWarning, match="evaluate_on_origin=True"):
        their = Theirs(**nothing)
    with pytest.warns(UserWarning, match="evaluate_on_origin=True.*val_interval") as caught:
        our = EMAHook(**nothing)
    assert caught[0].filename == __file__
    assert our.evaluate_on_origin is their.evaluate_on_origin is True
    assert our.evaluate_on_ema is their.evaluate_on_ema is False


def test_arguments_have_the_original_s_order_and_defaults() -> None:
    for arguments in ([], ["StochasticWeightAverage", True, 0, 2, False, True]):
        our, their = EMAHook(*arguments, momentum=0.1), Theirs(*arguments, momentum=0.1)
        assert vars(their).items() <= vars(our).items()
        assert our.priority == their.priority


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin_iter": 3, "begin_epoch": 2}, "begin_iter is 3 and begin_epoch is 2"),
        ({"begin_iter": -1}, "begin_iter is -1; a finite number"),
        ({"begin_epoch": -1}, "begin_epoch is -1; a finite number"),
    ],
)
def test_a_beginning_that_makes_no_sense_is_refused(
    arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(AssertionError):
        Theirs(**arguments)
    with pytest.raises(ValueError, match=message):
        EMAHook(**arguments)


def test_no_warning_is_given_where_there_is_no_cause() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMAHook()
        EMAHook(evaluate_on_ema=False, evaluate_on_origin=True)


def test_a_beginning_after_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begin_epoch is 3 and the run ends after 2"):
        runs.trained({"type": EMAHook, "begin_epoch": 3}, tmp_path, epochs=2)


def test_a_model_is_left_with_its_own_weights_after_both_evaluations(tmp_path: Path) -> None:
    hook = {"type": EMAHook, **AVERAGE, "evaluate_on_origin": True}
    run = runs.trained(hook, tmp_path, epochs=2)
    before = snapshot(run.model)
    run.runner.val_loop.run()
    assert runs.differences(snapshot(run.model), before) == []
