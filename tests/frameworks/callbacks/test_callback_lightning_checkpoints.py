"""What our callbacks leave in Lightning's checkpoints, and what later runs make of it."""

from __future__ import annotations

import copy
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from ema_fused.callbacks import lightning as ours
from tests import processes
from tests.frameworks.callbacks import lightning_run
from tests.frameworks.callbacks.lightning_cases import (
    BOTH,
    QUIET,
    STATES,
    Calls,
    Climbing,
    ema,
    fit,
    load,
    loss_of,
    saving,
)
from tests.frameworks.callbacks.lightning_run import BATCHES, Digits, held_out, training
from tests.networks import differences, floating, own

pytestmark = QUIET


def test_a_killed_training_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL in the second epoch, between two checkpoints; then a new process goes on."""
    folders = [tmp_path / name for name in ("whole", "broken")]
    script = lightning_run.__file__
    killed = processes.fork("lightning.pytorch", script, folders[1], "--kill-at", BATCHES + 7)
    folders[0].mkdir()
    lightning_run.run(folders[0])
    processes.finish(killed, -signal.SIGKILL)
    left = {path.name for path in folders[1].iterdir()}
    assert left == {f"step={step}.ckpt" for step in range(2, BATCHES + 7, 2)}
    processes.run_fork("lightning.pytorch", script, folders[1], "--resume")
    expected, found = (load(folder / "end.pt") for folder in folders)
    assert expected["step"] == found["step"] == 3 * BATCHES
    assert differences(expected["model"], found["model"]) == []
    for step in (2 * BATCHES, 2 * BATCHES + 4, 3 * BATCHES):
        expected, found = (load(folder / f"step={step}.ckpt") for folder in folders)
        for key in STATES:
            assert differences(expected[key], found[key]) == [], f"{key} after step {step}"
        assert (
            expected["callbacks"]["EMAWeightAveraging"] == found["callbacks"]["EMAWeightAveraging"]
        )


@BOTH
def test_a_checkpoint_written_in_a_validation_says_which_is_which_where_theirs_mixes_them_up(
    tmp_path: Path, kind: Any
) -> None:
    def save(trainer: Any, module: Any) -> None:
        held = module.weight.clone()
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
        assert torch.equal(module.weight, held)

    callbacks = [kind.EMAWeightAveraging(decay=0.5), Calls("on_validation_batch_end", save)]
    fit(tmp_path, callbacks, Climbing(), limit_train_batches=3, num_sanity_val_steps=0)
    checkpoint = load(tmp_path / "inside.ckpt")
    found = [float(checkpoint[key]["weight"]) for key in STATES[:2]]
    assert found == ([3.0, 2.25] if kind is theirs else [2.25, 3.0])


@BOTH
def test_a_hook_that_changes_one_of_the_two_states_changes_the_average_alone(
    tmp_path: Path, kind: Any
) -> None:
    """What a module's hook leaves out, the callback can't know: docs/silent_faults.md says so."""
    first = kind.EMAWeightAveraging(decay=0.5)
    fit(tmp_path, [first, saving(tmp_path)], Climbing(), limit_train_batches=3)
    model, seen = Climbing(), list[float]()

    def migrate(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["weight"] += 10

    model.on_load_checkpoint = migrate
    second = kind.EMAWeightAveraging(decay=0.5)

    def look(_: Any, module: Any) -> None:
        seen.extend([module.weight.item(), second._average_model.module.weight.item()])

    fit(tmp_path, [second, Calls("on_train_start", look)], model, max_epochs=2,
        limit_train_batches=3, ckpt_path=tmp_path / "step=3.ckpt")  # fmt: skip
    assert seen == [3.0, 12.25]


@BOTH
def test_the_last_checkpoint_keeps_the_model_s_own_weights_where_theirs_loses_them(
    tmp_path: Path, kind: Any
) -> None:
    last = saving(tmp_path, save_last=True, every_n_epochs=5)
    model = Climbing()
    fit(tmp_path, [kind.EMAWeightAveraging(decay=0.5), last], model, limit_train_batches=3)
    checkpoint = load(tmp_path / "last.ckpt")
    assert model.weight == checkpoint["state_dict"]["weight"] == 2.25
    assert checkpoint["current_model_state"]["weight"] == (2.25 if kind is theirs else 3.0)


@BOTH
def test_a_bfloat16_model_s_average_keeps_its_bits_where_theirs_loses_them(
    tmp_path: Path, kind: Any
) -> None:
    """The trainer converts the model after the average was made, which stays in float32."""
    callback = kind.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))
    raw: list[dict[str, Tensor]] = []
    average: list[dict[str, Tensor]] = []

    def look(_: Any, module: Any) -> None:
        raw.append(own(module))
        average.append(floating(own(callback._average_model.module)))

    callbacks = [Calls("on_validation_start", look), callback, Calls("on_validation_end", look)]
    fit(tmp_path, callbacks, limit_train_batches=5, precision="bf16-true", num_sanity_val_steps=0)
    assert raw[0]["network.0.weight"].dtype == torch.bfloat16
    assert differences(*raw) == []
    assert (differences(*average) != []) == (kind is theirs)


def test_a_checkpoint_in_a_bfloat16_validation_is_right(tmp_path: Path) -> None:
    callback = ours.EMAWeightAveraging(decay=0.8)
    raw: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}

    def look(_: Any, module: Any) -> None:
        raw.update(own(module))
        average.update(own(callback._average_model.module))

    def save(trainer: Any, _: Any) -> None:
        trainer.save_checkpoint(tmp_path / "inside.ckpt")

    fit(
        tmp_path,
        [Calls("on_validation_start", look), Calls("on_validation_batch_end", save), callback],
        limit_train_batches=5,
        precision="bf16-true",
        num_sanity_val_steps=0,
    )
    checkpoint = load(tmp_path / "inside.ckpt")
    assert average["network.0.weight"].dtype == torch.float32
    assert differences(checkpoint["state_dict"], average) == []
    assert differences(checkpoint["current_model_state"], raw) == []


@BOTH
def test_a_callback_serves_a_second_run_where_theirs_waits_for_the_first_one_s_steps(
    tmp_path: Path, kind: Any
) -> None:
    callback = kind.EMAWeightAveraging(decay=0.5)
    for _ in range(2):
        model = Climbing()
        fit(tmp_path, [callback], model, limit_train_batches=3)
    assert model.weight == (0.0 if kind is theirs else 2.25)


@BOTH
def test_epochs_are_counted_anew_too(tmp_path: Path, kind: Any) -> None:
    callback = kind.EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=0)
    for _ in range(2):
        fit(tmp_path, [callback], Climbing(), limit_train_batches=3)
    assert callback._average_model.n_averaged == (0 if kind is theirs else 1)


def test_fit_can_go_on_after_its_end(tmp_path: Path) -> None:
    """The second fit starts a new average from where the first one ended."""
    model = Climbing()
    fitting = fit(tmp_path, [ours.EMAWeightAveraging(decay=0.5)], model, limit_train_batches=3)
    assert model.weight == 2.25
    fitting.fit_loop.max_epochs = 2
    fitting.fit(model, training(), held_out())
    assert model.weight == 4.5  # 3.25, 4.25, 5.25: averages 3.25, 3.75, 4.5


def test_after_fit_the_model_counts_where_theirs_is_overwritten_by_the_average(
    tmp_path: Path,
) -> None:
    """update_bn(), say, or the weights of another epoch."""
    for kind, found in ((theirs, 2.25), (ours, 7.0)):
        model = Climbing()
        fitting = fit(tmp_path, [kind.EMAWeightAveraging(decay=0.5)], model, limit_train_batches=3)
        with torch.no_grad():
            model.weight.fill_(7.0)
        assert fitting.validate(model, held_out(), verbose=False)[0]["weight"] == found
        assert fitting.test(model, held_out(), verbose=False)[0]["weight"] == 7.0
        fitting.save_checkpoint(tmp_path / "after.ckpt")
        assert load(tmp_path / "after.ckpt")["state_dict"]["weight"] == found


def test_another_model_is_validated_as_it_is_where_theirs_gets_the_average(
    tmp_path: Path,
) -> None:
    for kind, found in ((theirs, 2.25), (ours, 0.0)):
        fitting = fit(
            tmp_path, [kind.EMAWeightAveraging(decay=0.5)], Climbing(), limit_train_batches=3
        )
        assert fitting.validate(Climbing(), held_out(), verbose=False)[0]["weight"] == found


def test_a_checkpoint_without_an_average_starts_one(tmp_path: Path) -> None:
    """Of the steps that follow alone: here 4 to 7, and 6 is due."""
    fit(tmp_path, [saving(tmp_path)], Climbing(), limit_train_batches=4)
    model, callback = Climbing(), ours.EMAWeightAveraging(decay=0.5, update_every_n_steps=3)
    path = tmp_path / "step=4.ckpt"
    fit(tmp_path, [callback], model, ckpt_path=path, limit_train_batches=4, max_epochs=2)
    assert model.weight == 7.0
    assert callback._average_model.n_averaged == 1


def test_layers_of_configure_model_are_averaged(tmp_path: Path) -> None:
    class Late(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.network = None

        def configure_model(self) -> None:
            if self.network is None:
                torch.manual_seed(0)
                self.network = Digits().network

    callback = ema(ours)
    with pytest.warns(match="outside the strategy's context"):
        fit(tmp_path, [callback], Late(), limit_train_batches=2)
    assert callback._average_model.module.network is not None
    assert callback._average_model.n_averaged == 2


def test_a_used_callback_can_be_copied_and_pickled(tmp_path: Path) -> None:
    callback = ours.EMAWeightAveraging(decay=0.5)
    fit(tmp_path, [callback], Climbing(), limit_train_batches=3)
    callback._kwargs = {}  # torch's functions can't be pickled, ours no more than those
    callback._average_model.avg_fn = None
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other._average_model.module.weight == 2.25
        assert other._model is None


def test_one_can_stand_for_the_other() -> None:
    callback = ours.EMAWeightAveraging()
    assert isinstance(callback, theirs.EMAWeightAveraging | theirs.WeightAveraging)
    assert callback.state_key == theirs.EMAWeightAveraging().state_key


class Alone(ModelCheckpoint):
    """Of another class: a trainer keeps one state for each."""


@BOTH
@pytest.mark.parametrize("at", ["step", "validation", "end", "after"])
def test_a_file_of_weights_alone_has_those_that_were_scored_where_theirs_has_raw_ones(
    tmp_path: Path, kind: Any, at: str
) -> None:
    """Every moment at which a ModelCheckpoint writes, and a save by hand after the training."""
    arguments: dict[str, Any] = {
        "step": {"every_n_train_steps": 2, "save_top_k": -1},
        "validation": {"monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": False},
        "end": {"save_last": True, "save_top_k": 0},
        "after": {"save_top_k": 0},
    }[at]
    weights = Alone(tmp_path / "weights", "{step}", save_weights_only=True, **arguments)
    whole = ModelCheckpoint(tmp_path / "whole", "{step}", **arguments)
    callbacks = [kind.EMAWeightAveraging(decay=0.8), weights, whole]
    fitted = fit(tmp_path, callbacks, max_epochs=2, val_check_interval=4)
    if at == "after":
        for folder, weights_only in (("weights", True), ("whole", False)):
            fitted.save_checkpoint(tmp_path / folder / "step=16.ckpt", weights_only)
    files = sorted(path.name for path in (tmp_path / "weights").iterdir())
    assert files
    same = []
    for name in files:
        alone, everything = load(tmp_path / "weights" / name), load(tmp_path / "whole" / name)
        assert not {"current_model_state", "optimizer_states", "callbacks"} & alone.keys()
        assert list(alone["state_dict"]) == list(everything["state_dict"])
        same.append(differences(alone["state_dict"], everything["state_dict"]) == [])
        averaged = loss_of(everything["state_dict"])
        assert (loss_of(alone["state_dict"]) == averaged) == same[-1]
        if at == "after":
            assert differences(own(fitted.lightning_module), alone["state_dict"]) == []
        elif kind is ours or at != "end":
            assert loss_of(everything["current_model_state"]) != averaged
    # Theirs exchanges the two in a validation, and has put the averages in at the end.
    assert all(same) == (kind is ours or at in ("end", "after"))


def test_weights_alone_keep_the_average_s_dtype_and_what_the_module_makes_of_them(
    tmp_path: Path,
) -> None:
    class Marked(Digits):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seen"] = loss_of(checkpoint["state_dict"])
            del checkpoint["state_dict"]["network.0.weight"]

    saved = ModelCheckpoint(tmp_path / "weights", "{step}", save_weights_only=True, save_top_k=-1)
    average = ours.EMAWeightAveraging(decay=0.8)
    fitted = fit(tmp_path, [average, saved], Marked(), max_epochs=1)
    alone = load(tmp_path / "weights" / f"step={BATCHES}.ckpt")
    assert "network.0.weight" not in alone["state_dict"]
    final = own(fitted.lightning_module)
    assert alone["seen"] == loss_of(final)
    del final["network.0.weight"]
    assert differences(final, alone["state_dict"]) == []
    # In the strategy nothing is left behind.
    assert "lightning_module_state_dict" not in vars(fitted.strategy)


@pytest.mark.parametrize("weights_only", [True, False])
def test_saving_weights_alone_leaves_the_training_as_it_is(
    tmp_path: Path, weights_only: bool
) -> None:
    def run(callbacks: list[Any]) -> dict[str, Tensor]:
        return own(fit(tmp_path, callbacks, max_epochs=2, val_check_interval=3).lightning_module)

    plain = run([ours.EMAWeightAveraging(decay=0.8)])
    saves = Calls(
        "on_validation_end",
        lambda trainer, _: trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only),
    )
    within = Calls(
        "on_validation_batch_end",
        lambda trainer, _: trainer.save_checkpoint(tmp_path / "y.ckpt", weights_only),
    )
    assert differences(plain, run([ours.EMAWeightAveraging(decay=0.8), saves, within])) == []
    assert (
        differences(
            load(tmp_path / "x.ckpt")["state_dict"], load(tmp_path / "y.ckpt")["state_dict"]
        )
        == []
    )


def test_without_an_average_the_model_s_own_weights_are_written(tmp_path: Path) -> None:
    average = ours.EMAWeightAveraging(decay=0.8, update_starting_at_step=100)
    saved = ModelCheckpoint(tmp_path / "weights", "{step}", save_weights_only=True)
    fitted = fit(tmp_path, [average, saved])
    alone = load(tmp_path / "weights" / f"step={BATCHES}.ckpt")
    assert differences(own(fitted.lightning_module), alone["state_dict"]) == []


def test_another_run_of_the_trainer_without_the_callback_writes_raw_weights(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "weights", "{step}", save_weights_only=True, save_top_k=-1)
    average = ours.EMAWeightAveraging(decay=0.8)
    fitted = fit(tmp_path, [average, saved])
    fitted.callbacks.remove(average)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(Digits(seed=1), training(), held_out())
    alone = load(tmp_path / "weights" / f"step={2 * BATCHES}.ckpt")
    assert differences(own(fitted.lightning_module), alone["state_dict"]) == []
