"""What Lightning's trainer evaluates with our callbacks, and when they update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from ema_fused.callbacks import lightning as ours
from ema_fused.modules.exchanging import Exchange
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
from tests.frameworks.callbacks.lightning_run import BATCHES, Digits, held_out, trainer, training
from tests.networks import differences, overflow_at, own, snapshot

pytestmark = QUIET


def test_checkpoints_are_chosen_by_the_averaged_metric(tmp_path: Path) -> None:
    chosen = saving(tmp_path, monitor="val_loss", save_top_k=1)
    fit(tmp_path, [ours.EMAWeightAveraging(decay=0.8), chosen], max_epochs=2)
    best = load(Path(chosen.best_model_path))
    score = float(chosen.best_model_score)
    assert loss_of(best["state_dict"]) == pytest.approx(score, rel=1e-6)
    assert abs(loss_of(best["current_model_state"]) - score) > 0.01


@pytest.mark.parametrize("averages", [False, True])
def test_early_stopping_watches_the_averaged_metric(tmp_path: Path, averages: bool) -> None:
    """The weight goes 1, 2, 3, ...; its average 1, 1.5, 2.25, 3.125."""
    stop = EarlyStopping("weight", mode="max", stopping_threshold=2.5, patience=100)
    average = [ours.EMAWeightAveraging(decay=0.5)] if averages else []
    fitted = fit(tmp_path, [*average, stop], Climbing(), limit_train_batches=1, max_epochs=20)
    assert fitted.global_step == (4 if averages else 3)


def test_the_module_s_own_hook_sees_the_averages_where_theirs_is_too_early(
    tmp_path: Path,
) -> None:
    class Looking(Climbing):
        seen: list[float]

        def on_validation_epoch_end(self) -> None:
            self.seen.append(float(self.weight))

    found = []
    for kind in (theirs, ours):
        model = Looking()
        model.seen = []
        callback = kind.EMAWeightAveraging(decay=0.5)
        fit(tmp_path, [callback], model, limit_train_batches=3, num_sanity_val_steps=0)
        found.append(model.seen)
    assert found == [[3.0], [2.25]]


def test_swaps_are_in_place_and_planned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    prepare = Exchange._prepare
    monkeypatch.setattr(Exchange, "_prepare", lambda self: planned.append(1) or prepare(self))
    places: list[list[int]] = []
    values: list[Tensor] = []

    def look(_: Any, module: Any) -> None:
        places.append([tensor.data_ptr() for tensor in module.state_dict(keep_vars=True).values()])
        values.append(module.network[0].weight.detach().clone())

    moments = [Calls("on_validation_batch_start", look), Calls("on_validation_end", look)]
    fit(tmp_path, [ema(ours), *moments], max_epochs=2, val_check_interval=2, num_sanity_val_steps=0)
    assert len(planned) == 1
    assert len(places) == 16 and all(place == places[0] for place in places)
    assert all(not torch.equal(a, b) for a, b in zip(values[2::2], values[3::2], strict=True))


@BOTH
def test_steps_are_counted_and_not_batches(tmp_path: Path, kind: Any) -> None:
    callback = ema(kind)
    fit(tmp_path, [callback], limit_train_batches=7, accumulate_grad_batches=3)
    assert callback._average_model.n_averaged == 3


@BOTH
def test_steps_that_a_gradient_scaler_skips_count_as_the_trainer_counts_them(
    tmp_path: Path, kind: Any
) -> None:
    model = Digits()
    overflow_at(model.network[0].weight, {1, 2})
    callback = ema(kind)
    scaler = torch.amp.GradScaler("cpu")
    scaled = MixedPrecision("16-mixed", "cpu", scaler)
    trained = fit(tmp_path, [callback], model, limit_train_batches=5, plugins=[scaled])
    assert scaler.get_scale() == 2.0**16 / 4  # two were skipped
    assert callback._average_model.n_averaged == trained.global_step == 5


def test_should_update_is_asked_once_a_step_where_theirs_is_asked_again(tmp_path: Path) -> None:
    asked: dict[str, list[int]] = {}
    for name, kind in (("theirs", theirs), ("ours", ours)):

        class Every2(kind.WeightAveraging):  # type: ignore[misc, name-defined]
            steps: list[int] = asked.setdefault(name, [])

            def should_update(
                self, step_idx: int | None = None, epoch_idx: int | None = None
            ) -> bool:
                if step_idx is not None:
                    self.steps.append(step_idx)
                return step_idx is not None and step_idx % 2 == 0

        callback = Every2(use_buffers=False)
        fit(tmp_path, [callback], accumulate_grad_batches=3)
        assert callback._average_model.n_averaged == 2
    assert asked["ours"] == [0, 1, 2]
    assert asked["theirs"] == [0, 1, 1, 2]


def test_two_optimizers_are_averaged_where_theirs_never_are(tmp_path: Path) -> None:
    averaged = []
    for kind in (theirs, ours):
        callback = kind.EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
        fit(tmp_path, [callback], Climbing(optimizers=2), limit_train_batches=4)
        averaged.append(int(callback._average_model.n_averaged))
    assert averaged == [0, 4]


def test_a_validation_that_raises_leaves_the_model_its_weights_where_theirs_does_not(
    tmp_path: Path,
) -> None:
    def fail(_: Any, module: Any) -> None:
        if module.trainer.global_step:
            raise RuntimeError("out of data")

    left = []
    for kind in (theirs, ours):
        model, before = Digits(), {}
        remember = Calls(
            "on_train_batch_end", lambda _, module, before=before: before.update(own(module))
        )
        with pytest.raises(RuntimeError, match="out of data"):
            fit(tmp_path, [ema(kind), remember, Calls("on_validation_batch_start", fail)], model)
        left.append(differences(own(model), before))
    assert left[0] != [] and left[1] == []


def test_an_interrupted_training_is_tested_by_its_average_where_theirs_is_not(
    tmp_path: Path,
) -> None:
    def stop(trainer: Any, _: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("stopped")

    for kind, tested in ((theirs, 3.0), (ours, 2.25)):
        model = Climbing()
        callback = kind.EMAWeightAveraging(decay=0.5)
        fitting = trainer(tmp_path, [callback, Calls("on_train_batch_end", stop)], max_epochs=1)
        with pytest.raises(RuntimeError, match="stopped"):
            fitting.fit(model, training(), held_out())
        assert fitting.validate(model, held_out(), verbose=False)[0]["weight"] == 2.25
        assert fitting.test(model, held_out(), verbose=False)[0]["weight"] == tested
        assert model.weight == 3.0


@pytest.mark.parametrize("evaluate", ["validate", "test"])
def test_a_checkpoint_is_evaluated_by_its_average_where_theirs_tests_raw_weights(
    tmp_path: Path, evaluate: str
) -> None:
    for kind in (theirs, ours):
        folder = tmp_path / kind.__name__
        fitted = fit(folder, [ema(kind), saving(folder)], max_epochs=2)
        path = folder / f"step={BATCHES}.ckpt"
        checkpoint = load(path)
        averaged, raw = (loss_of(checkpoint[key]) for key in STATES[:2])
        assert abs(averaged - raw) > 0.001
        (scores,) = getattr(fitted, evaluate)(
            fitted.lightning_module, held_out(), ckpt_path=path, weights_only=False, verbose=False
        )
        (score,) = scores.values()
        is_raw = kind is theirs and evaluate == "test"
        assert score == pytest.approx(raw if is_raw else averaged, rel=1e-6)
        if kind is ours:
            assert differences(own(fitted.lightning_module), checkpoint["state_dict"]) == []


def test_predictions_are_the_average_s(tmp_path: Path) -> None:
    def stop(trainer: Any, _: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("stopped")

    callback, model = ours.EMAWeightAveraging(decay=0.8), Digits()
    fitting = trainer(tmp_path, [callback, Calls("on_train_batch_end", stop)], max_epochs=1)
    with pytest.raises(RuntimeError, match="stopped"):
        fitting.fit(model, training(), held_out())
    before = snapshot(model)
    (predicted,) = fitting.predict(model, held_out())
    with torch.no_grad():
        average = callback._average_model.module.eval()
        expected = average.network(next(iter(held_out()))[0])
    assert torch.equal(predicted, expected)
    assert differences(snapshot(model), before) == []


def test_before_the_first_update_the_model_counts_where_theirs_is_untrained(
    tmp_path: Path,
) -> None:
    for kind in (theirs, ours):
        model, folder = Climbing(), tmp_path / kind.__name__
        seen: list[float] = []
        look = Calls(
            "on_validation_batch_end", lambda _, m, seen=seen: seen.append(float(m.weight))
        )
        callback = kind.EMAWeightAveraging(decay=0.5, update_starting_at_step=3)
        saved = saving(folder, every_n_train_steps=2)
        fit(folder, [callback, look, saved], model, max_steps=4, val_check_interval=1,
            num_sanity_val_steps=0)  # fmt: skip
        assert seen == ([0.0, 0.0, 0.0, 4.0] if kind is theirs else [1.0, 2.0, 3.0, 4.0])
        checkpoint = load(folder / "step=2.ckpt")
        assert checkpoint["averaging_state"]["n_averaged"] == 0
        assert checkpoint["current_model_state"]["weight"] == 2.0
        assert checkpoint["state_dict"]["weight"] == (0.0 if kind is theirs else 2.0)


def test_without_any_update_the_training_is_kept_where_theirs_throws_it_away(
    tmp_path: Path,
) -> None:
    for kind, left in ((theirs, 0.0), (ours, 4.0)):
        callback = kind.EMAWeightAveraging(decay=0.5, update_starting_at_step=100)
        model = Climbing()
        with pytest.warns() as warned:
            fit(tmp_path, [callback], model, max_steps=4)
        assert model.weight == left
        said = [str(w.message) for w in warned if "has made no update" in str(w.message)]
        assert len(said) == (kind is ours)
