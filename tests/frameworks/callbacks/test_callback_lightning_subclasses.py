"""Subclasses that override what the original swaps and copies with, beside the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ema_fused.callbacks import lightning as ours
from tests.frameworks.callbacks.lightning_cases import BOTH, QUIET, Calls, Scores, fit, load
from tests.frameworks.callbacks.lightning_run import BATCHES, Digits, held_out, trainer, training
from tests.networks import differences, floating, own

pytestmark = QUIET


def noting(kind: Any, **arguments: Any) -> Any:
    """One that calls the original's methods, and notes when."""

    class Noting(kind.EMAWeightAveraging):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(decay=0.8, **arguments)
            self.moments: list[str] = []

        def _swap_models(self, pl_module: Any) -> None:
            super()._swap_models(pl_module)
            # What is in the model now tells when this was called.
            self.moments.append(f"swap at {float(pl_module.network[0].weight.detach().sum())}")

        def _copy_average_to_current(self, pl_module: Any) -> None:
            super()._copy_average_to_current(pl_module)
            self.moments.append(f"copy at {float(pl_module.network[0].weight.detach().sum())}")

    return Noting()


def partly(kind: Any, **arguments: Any) -> Any:
    """One that swaps and copies by itself, and leaves the last layer as it is."""

    class Partly(kind.EMAWeightAveraging):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(decay=0.8, **arguments)

        def _pairs(self, pl_module: Any) -> Any:
            averaged = dict(self._average_model.module.named_parameters())
            for name, parameter in pl_module.named_parameters():
                if not name.startswith("network.5"):
                    yield averaged[name].data, parameter.data

        def _swap_models(self, pl_module: Any) -> None:
            for averaged, present in self._pairs(pl_module):
                kept = averaged.clone()
                averaged.copy_(present)
                present.copy_(kept)

        def _copy_average_to_current(self, pl_module: Any) -> None:
            for averaged, present in self._pairs(pl_module):
                present.copy_(averaged)

    return Partly()


@pytest.mark.parametrize("made", [noting, partly])
def test_they_are_called_when_the_original_calls_them(tmp_path: Path, made: Any) -> None:
    scores, models, moments = [], [], []
    for kind in (theirs, ours):
        seen = Scores()
        callback = made(kind)
        fitted = fit(
            tmp_path, [callback, seen], max_epochs=2, val_check_interval=4, num_sanity_val_steps=0
        )
        scores.append(seen.seen)
        models.append(own(fitted.lightning_module))
        moments.append(getattr(callback, "moments", None))
    assert scores[0] == scores[1]
    assert differences(*map(floating, models)) == []
    assert moments[0] == moments[1]
    if made is noting:
        assert len(moments[1]) == 2 * 4 + 1


def test_only_one_of_the_two_may_be_overridden(tmp_path: Path) -> None:
    models = []
    for kind in (theirs, ours):
        for name in ("_swap_models", "_copy_average_to_current"):
            made = type(partly(kind))
            only = type(
                "Only", (kind.EMAWeightAveraging,), {n: vars(made)[n] for n in (name, "_pairs")}
            )
            fitted = fit(tmp_path, [only(decay=0.8)], val_check_interval=4)
            models.append(own(fitted.lightning_module))
    assert differences(floating(models[0]), floating(models[2])) == []
    assert differences(floating(models[1]), floating(models[3])) == []
    assert differences(models[0], models[1]) != []


@pytest.mark.parametrize("made", [noting, partly])
def test_checkpoints_within_a_validation_say_which_is_which(tmp_path: Path, made: Any) -> None:
    def save(trainer: Any, _: Any) -> None:
        for name, weights_only in (("whole", False), ("alone", True)):
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt", weights_only)

    def note(trainer: Any, module: Any) -> None:
        raw.update(own(module))

    raw: dict[str, Tensor] = {}
    calls = [Calls("on_train_batch_end", note), Calls("on_validation_batch_end", save)]
    fit(tmp_path, [made(ours), *calls], val_check_interval=4, num_sanity_val_steps=0)
    whole, alone = load(tmp_path / "whole.ckpt"), load(tmp_path / "alone.ckpt")
    assert differences(whole["current_model_state"], raw) == []
    assert differences(whole["state_dict"], alone["state_dict"]) == []
    assert differences(whole["state_dict"], raw) != []


@pytest.mark.parametrize("made", [noting, partly])
def test_a_validation_that_raises_leaves_the_model_its_weights(tmp_path: Path, made: Any) -> None:
    raw: dict[str, Tensor] = {}

    def note(trainer: Any, module: Any) -> None:
        raw.update(own(module))

    def fail(trainer: Any, module: Any) -> None:
        raise RuntimeError("stopped")

    model = Digits()
    calls = [Calls("on_train_batch_end", note), Calls("on_validation_batch_end", fail)]
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, [made(ours), *calls], model, val_check_interval=4, num_sanity_val_steps=0)
    assert differences(own(model), raw) == []


@BOTH
def test_a_test_swaps_nothing_where_the_methods_are_a_subclass_s(tmp_path: Path, kind: Any) -> None:
    model, average = Digits(), noting(kind)

    def stop(trainer: Any, module: Any) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, [average, Calls("on_train_batch_end", stop)], model, num_sanity_val_steps=0)
    raw = own(model)
    trainer(tmp_path, [average]).test(model, held_out(), verbose=False)
    assert average.moments == []
    assert differences(own(model), raw) == []


def test_before_the_first_update_they_are_not_called_where_theirs_copies_the_untrained(
    tmp_path: Path,
) -> None:
    average = noting(ours, update_starting_at_step=100)
    fitted = fit(tmp_path, [average])
    assert average.moments == []
    later = noting(ours, update_starting_at_step=BATCHES - 1)
    fit(tmp_path, [later], num_sanity_val_steps=1)
    assert len(later.moments) == 3
    assert torch.isfinite(fitted.lightning_module.network[0].weight).all()


def test_a_training_with_them_is_resumed_to_the_bit(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1)
    whole = fit(tmp_path, [partly(ours), saving], max_epochs=2).lightning_module
    at_the_end = load(tmp_path / "saved" / f"step={BATCHES}.ckpt")
    assert differences(at_the_end["state_dict"], at_the_end["current_model_state"]) != []
    loader = training()
    loader.load_state_dict({"epoch": 1, "position": 0})
    fitting = trainer(tmp_path, [partly(ours)], max_epochs=2)
    path = tmp_path / "saved" / f"step={BATCHES}.ckpt"
    fitting.fit(Digits(seed=1), loader, held_out(), ckpt_path=path, weights_only=False)
    assert differences(own(whole), own(fitting.lightning_module)) == []
