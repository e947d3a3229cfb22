"""Where our ``EMAHook`` differs from mmengine's on purpose: the original's fault, then ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import averaged_model as theirs
from mmengine.runner import Runner
from torch import Tensor, nn

from ema_fused.hooks import mmengine as ours
from tests.frameworks.hooks.ema_hooks import (
    KINDS,
    OURS,
    QUIET,
    THEIRS,
    trained_both,
    unequal,
    without_integers,
)
from tests.frameworks.hooks.mmengine_runs import (
    Net,
    Run,
    build,
    differences,
    load,
    side_by_side,
    trained,
)
from tests.networks import snapshot

pytestmark = QUIET

HOOK = {**KINDS["annealing"], "interval": 3}
SIDES = {"type": THEIRS, **HOOK}, {"type": OURS, **HOOK}


# Checkpoints whose two states don't have the same names.


def changed(change: Callable[[Any, Any], None], folder: Path) -> Path:
    """A checkpoint after ``change(state_dict, ema_state_dict)``."""
    run = trained(SIDES[0], folder, epochs=2, seed=5)
    checkpoint = run.checkpoint("epoch_2.pth")
    change(checkpoint["state_dict"], checkpoint["ema_state_dict"])
    file = folder / "changed.pth"
    torch.save(checkpoint, file)
    return file


def loaded(hook: dict[str, Any], file: Path, folder: Path) -> Run:
    """A run that has resumed and goes no further: it has no iteration left."""
    return trained(hook, folder, load_from=file, resume=True, epochs=2)


def weights(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the model, and of its average."""
    return dict(run.model.state_dict()), dict(run.hook().ema_model.module.state_dict())


def warnings_of(run: Run) -> list[str]:
    return [message for message in run.messages if "doesn't match" in message]


def test_a_name_that_the_average_alone_has_is_left_out_where_theirs_raise(tmp_path: Path) -> None:
    file = changed(lambda model, ema: ema.update({"module.aux.weight": torch.ones(2)}), tmp_path)
    with pytest.raises(KeyError, match=r"^'aux\.weight'$"):
        loaded(SIDES[0], file, tmp_path / "theirs")
    run = loaded(SIDES[1], file, tmp_path / "ours")
    (said,) = warnings_of(run)
    assert "state_dict lacks aux.weight;" in said and "ema_state_dict lacks nothing" in said
    intact = loaded(SIDES[1], tmp_path / "epoch_2.pth", tmp_path / "intact")
    assert differences(weights(intact), weights(run)) == []
    assert run.hook().ema_model.steps == 10 and warnings_of(intact) == []


def test_a_name_that_the_average_lacks_is_filled_in_where_theirs_stay_as_constructed(
    tmp_path: Path,
) -> None:
    file = changed(lambda model, ema: ema.pop("module.head.weight"), tmp_path)
    saved = load(file)["state_dict"]["head.weight"]  # the average: the model's own is lost
    their_run = loaded(SIDES[0], file, tmp_path / "theirs")
    their_model, their_average = weights(their_run)
    assert torch.equal(their_model["head.weight"], saved)
    assert not torch.equal(their_average["head.weight"], saved)
    assert not their_run.messages or not any("head" in m for m in their_run.messages)

    run = loaded(SIDES[1], file, tmp_path / "ours")
    for state in weights(run):
        assert torch.equal(state["head.weight"], saved)
    (said,) = warnings_of(run)
    assert "state_dict lacks nothing; its ema_state_dict lacks head.weight." in said
    intact = loaded(SIDES[1], tmp_path / "epoch_2.pth", tmp_path / "intact")
    others = [name for name in their_model if name != "head.weight"]
    for state, whole in zip(weights(run), weights(intact), strict=True):
        assert differences({n: state[n] for n in others}, {n: whole[n] for n in others}) == []


def test_a_name_that_the_model_lacks_is_filled_in_where_theirs_raise(tmp_path: Path) -> None:
    file = changed(lambda model, ema: model.pop("head.weight"), tmp_path)
    with pytest.raises(KeyError, match=r"^'head\.weight'$"):
        loaded(SIDES[0], file, tmp_path / "theirs")
    run = loaded(SIDES[1], file, tmp_path / "ours")
    saved = load(file)["ema_state_dict"]["module.head.weight"]
    for state in weights(run):
        assert torch.equal(state["head.weight"], saved)
    (said,) = warnings_of(run)
    assert "state_dict lacks head.weight; its ema_state_dict lacks nothing." in said


def test_an_average_starts_as_its_model_where_a_checkpoint_has_neither(tmp_path: Path) -> None:
    """A layer that is newer than the checkpoint: theirs averages what no model ever had."""

    def without_the_head(model: Any, ema: Any) -> None:
        for name in ("head.weight", "head.bias"):
            del model[name], ema[f"module.{name}"]

    file = changed(without_the_head, tmp_path)
    their_model, their_average = weights(loaded(SIDES[0], file, tmp_path / "theirs"))
    assert not torch.equal(their_model["head.weight"], their_average["head.weight"])
    run = loaded(SIDES[1], file, tmp_path / "ours")
    model, average = weights(run)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(model[name], average[name])
    assert torch.equal(model["head.weight"], their_model["head.weight"])
    (said,) = warnings_of(run)
    assert "lacks head.weight, head.bias; its ema_state_dict lacks head.weight, head.bias" in said


def test_a_wrappers_prefix_is_taken_off_where_theirs_load_nothing(tmp_path: Path) -> None:
    """mmengine takes it off for the model alone."""
    trained(None, tmp_path, epochs=2, seed=5)
    checkpoint = load(tmp_path / "epoch_2.pth")
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {f"module.{name}": tensor for name, tensor in state.items()}
    file = tmp_path / "prefixed.pth"
    torch.save(checkpoint, file)
    runs = [build(hook, tmp_path / hook["type"], load_from=file).val() for hook in SIDES]
    # An evaluation puts the average in and takes it out: both are what was loaded.
    their_average, our_average = (weights(run)[1] for run in runs)
    assert not torch.equal(their_average["head.weight"], state["head.weight"])
    assert differences(dict(state), our_average) == []


# Evaluations that raise, and checkpoints that are written in them.


class FaultError(Exception):
    """Raised by nobody else."""


class Fails(Hook):  # type: ignore[misc]
    """Raises in the middle of the validation after epoch 2, once."""

    def __init__(self) -> None:
        self.has_failed = False

    def after_val_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        if runner.epoch == 2 and batch_idx == 2 and not self.has_failed:
            self.has_failed = True
            # mmengine would take what metrics have seen by now into the next evaluation.
            for metric in runner.val_evaluator.metrics:
                metric.results.clear()
            raise FaultError


def failed(hook: dict[str, Any], folder: Path) -> Run:
    run = build(hook, folder, epochs=4, hooks=[{"type": Fails}])
    with pytest.raises(FaultError):
        run.train()
    return run


def test_a_training_goes_on_after_a_failed_evaluation_where_theirs_trains_the_averages(
    tmp_path: Path,
) -> None:
    whole = trained(SIDES[0], tmp_path / "whole", epochs=4)
    their_run, our_run = (failed(hook, tmp_path / hook["type"]).go_on() for hook in SIDES)
    assert our_run.metrics == [whole.metrics[0], *whole.metrics[2:]]
    assert their_run.metrics[1:] != whole.metrics[2:]
    found, expected = our_run.everything(), whole.everything()
    for name in ("model", "average"):
        assert differences(found[name], expected[name]) == []
        assert differences(their_run.everything()[name], expected[name]) != []
    for state in ("state_dict", "ema_state_dict", "optimizer"):
        assert differences(found["epoch_4.pth"][state], expected["epoch_4.pth"][state]) == []


def test_the_next_run_begins_with_the_models_own_weights_where_theirs_has_averages(
    tmp_path: Path,
) -> None:
    raw = trained(SIDES[0], tmp_path / "whole", epochs=2).everything()["model"]
    their_run, our_run = (failed(hook, tmp_path / hook["type"]).val() for hook in SIDES)
    assert differences(snapshot(our_run.model), raw) == []
    assert differences(snapshot(their_run.model), raw) != []


def test_the_next_evaluation_is_of_averages_again_where_theirs_is_of_the_models_own_weights(
    tmp_path: Path,
) -> None:
    expected = trained(SIDES[0], tmp_path / "whole", epochs=2).metrics[-1]
    for hook in SIDES:
        run = failed(hook, tmp_path / hook["type"])
        run.runner.val_loop.run()
        assert (run.metrics[-1] == expected) == (hook["type"] == OURS)


class SavesInEvaluations(Hook):  # type: ignore[misc]
    def after_val_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        if batch_idx == 1:
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            runner.save_checkpoint(runner.work_dir, f"during_{runner.epoch}.pth", meta=meta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_an_evaluation_is_as_any_other_where_theirs_is_exchanged(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def model() -> nn.Module:
        return Net().to(dtype)

    arguments = {"epochs": 4, "model": model}
    options = {"averaged_dtype": torch.float32}
    whole = trained({**SIDES[1], **options}, tmp_path / "whole", **arguments)
    further = {"hooks": [{"type": SavesInEvaluations}], **arguments}
    run = trained({**SIDES[1], **options}, tmp_path / "ours", **further)
    for epoch in (1, 2, 3, 4):
        found, usual = run.checkpoint(f"during_{epoch}.pth"), run.checkpoint(f"epoch_{epoch}.pth")
        for state in ("state_dict", "ema_state_dict"):
            assert differences(found[state], usual[state]) == []
    # Nor does it change what comes after it, in this run or in one that resumes from it.
    expected = whole.everything()
    found = {name: kept for name, kept in run.everything().items() if "during" not in name}
    assert differences(found, expected) == []
    file = run.folder / "during_2.pth"
    again = trained(
        {**SIDES[1], **options}, tmp_path / "again", load_from=file, resume=True, **arguments
    )
    assert again.metrics == whole.metrics[2:]
    assert differences(again.everything()["average"], expected["average"]) == []

    if dtype == torch.float32:
        their_run = trained(SIDES[0], tmp_path / "theirs", **further)
        found, usual = (their_run.checkpoint(f"{name}_4.pth") for name in ("during", "epoch"))
        key = "head.weight"
        assert torch.equal(found["state_dict"][key], usual["ema_state_dict"][f"module.{key}"])
        assert not torch.equal(found["state_dict"][key], usual["state_dict"][key])


def test_a_checkpoint_of_an_evaluation_is_right_where_its_tensors_are_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a model on a GPU are: they hold the averages when the hook is asked."""

    def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in state.items()}

    monkeypatch.setattr("mmengine.runner.runner.weights_to_cpu", copies)
    run = trained(SIDES[1], tmp_path, epochs=2, hooks=[{"type": SavesInEvaluations}])
    found, usual = run.checkpoint("during_2.pth"), run.checkpoint("epoch_2.pth")
    for state in ("state_dict", "ema_state_dict"):
        assert differences(dict(found[state]), dict(usual[state])) == []


# Tensors.


def test_integer_buffers_of_a_checkpoint_are_current_where_theirs_are_those_of_the_first_step(
    tmp_path: Path,
) -> None:
    runs = trained_both(tmp_path, {**HOOK, "update_buffers": True}, epochs=2)
    name = "norm.num_batches_tracked"
    their_state, our_state = (run.checkpoint("epoch_2.pth")["state_dict"] for run in runs)
    assert their_state[name] == 1
    assert our_state[name] == runs[1].model.state_dict()[name] == 10
    found = unequal(*runs)
    assert found != [] and without_integers(found) == []


class Doubles(Hook):  # type: ignore[misc]
    """Converts the model, not its average, and notes what is evaluated."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 8:
            runner.model.double()

    def after_val_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self.evaluated = snapshot(runner.model)


def test_a_converted_model_is_followed_where_theirs_raise(tmp_path: Path) -> None:
    arguments = {"epochs": 4, "hooks": [{"type": Doubles}]}
    with pytest.raises(RuntimeError, match="dtype"):
        trained({"type": THEIRS, **HOOK}, tmp_path / "theirs", **arguments)
    run = trained({"type": OURS, **HOOK}, tmp_path / "ours", **arguments)
    average = run.hook().ema_model
    assert average.steps == 20
    assert average.module.head.weight.dtype == torch.float32
    evaluated = run.hook(Doubles).evaluated
    assert torch.equal(evaluated["head.weight"], average.module.head.weight.double())
    assert run.model.head.weight.dtype == torch.float64
    assert not torch.equal(run.model.head.weight, evaluated["head.weight"])
    assert not torch.equal(run.model.head.weight, run.model.head.weight.float().double())


# Averages that are not ours.


class Halfway(theirs.BaseAveragedModel):  # type: ignore[misc]
    """As users of mmengine write them."""

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        averaged_param.mul_(0.5).add_(source_param, alpha=0.5)


class Refined(theirs.ExponentialMovingAverage):  # type: ignore[misc]
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        super().avg_func(averaged_param, source_param.clamp(-0.1, 0.1), steps)


@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("kind", [Halfway, Refined])
def test_an_average_of_the_users_own_works_as_ever_with_one_warning(
    kind: type, update_buffers: bool, tmp_path: Path
) -> None:
    hook = {
        "ema_type": kind,
        "interval": 3,
        "begin_iter": 4,
        "update_buffers": update_buffers,
    }
    both = side_by_side({"type": EMAHook, **hook}, {"type": OURS, **hook}, tmp_path, epochs=4)
    assert unequal(*both) == []
    assert type(both[1].hook()) is ours.EMAHook and type(both[1].hook().ema_model) is kind
    (slow,) = (message for message in both[1].messages if "runs at its own speed" in message)
    assert kind.__name__ in slow
    resumed = trained(
        {"type": OURS, **hook},
        tmp_path / "resumed",
        load_from=both[1].folder / "epoch_2.pth",
        resume=True,
        epochs=4,
    )
    assert slow in resumed.messages
    assert resumed.metrics == both[1].metrics[2:]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_an_exchange_that_was_not_begun_is_not_ended_where_theirs_puts_the_averages_in(
    stage: str, tmp_path: Path
) -> None:
    """As by a loop of one's own that calls the hooks of an evaluation's end alone."""
    for run in trained_both(tmp_path, KINDS["ema"], epochs=1):
        hook, model = run.hook(), run.model
        own = [weight.clone() for weight in model.parameters()]
        averages = [weight.clone() for weight in hook.ema_model.module.parameters()]
        getattr(hook, f"after_{stage}_epoch")(run.runner)
        expected = own if type(hook) is ours.EMAHook else averages
        assert all(map(torch.equal, model.parameters(), expected))
        assert not any(map(torch.equal, own, averages))
