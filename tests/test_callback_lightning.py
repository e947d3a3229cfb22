"""ema_fused.callbacks.lightning beside Lightning's own callbacks, under its real trainer."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch", reason="needs lightning")
pytest.importorskip("sklearn", reason="trains on scikit-learn's digits")

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_run import BATCHES, Digits, held_out, run, trainer, training
from networks import differences, snapshot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ema_fused.callbacks import lightning as ours
from ema_fused.swapping import Exchange

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and intervals
STATES = ("state_dict", "current_model_state", "averaging_state")
BOTH = pytest.mark.parametrize("kind", [theirs, ours], ids=["theirs", "ours"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without batch norm's counter: torch averages it and cuts off what is behind the point."""
    return {name: tensor.clone() for name, tensor in state.items() if tensor.is_floating_point()}


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=False)
    return checkpoint


def loss_of(state: dict[str, Tensor]) -> float:
    model = Digits().eval()
    model.load_state_dict(state)
    images, labels = next(iter(held_out()))
    with torch.no_grad():
        return float(cross_entropy(model.network(images), labels))


class Scores(Callback):
    """The metrics of each validation."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["val_loss"]))


class Calls(Callback):
    """Calls a function at one moment of the training."""

    def __init__(self, moment: str, function: Callable[[Any, Any], Any]) -> None:
        setattr(self, moment, lambda trainer, pl_module, *_, **__: function(trainer, pl_module))


def fit(folder: Path, callbacks: list[Any], model: Any = None, **arguments: Any) -> Any:
    """A trained trainer; its model is ``trainer.lightning_module``."""
    resume = arguments.pop("ckpt_path", None)
    fitting = trainer(folder, callbacks, **{"max_epochs": 1} | arguments)
    model = Digits() if model is None else model
    fitting.fit(model, training(), held_out(), ckpt_path=resume, weights_only=False)
    return fitting


def ema(kind: Any, **arguments: Any) -> Any:
    """The callback with the same arithmetic in both."""
    return kind.WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8), **arguments)


def saving(folder: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", **{"save_top_k": -1} | arguments)


def own(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# Side by side with the original.


@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers-too", "parameters"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_is_equal_to_the_bit(tmp_path: Path, accumulate: int, use_buffers: bool) -> None:
    scores, models = [], []
    for name, kind in (("theirs", theirs), ("ours", ours)):
        seen = Scores()
        fitted = fit(
            tmp_path,
            [
                ema(kind, use_buffers=use_buffers),
                seen,
                saving(tmp_path / name, monitor="val_loss", save_on_train_epoch_end=False),
            ],
            max_epochs=2,
            val_check_interval=3,
            accumulate_grad_batches=accumulate,
        )
        scores.append(seen.seen)
        models.append(own(fitted.lightning_module))
    assert scores[0] == scores[1]
    assert differences(*map(floats, models)) == []
    written = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert written == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(written) >= 3
    for name in written:
        their, our = load(tmp_path / "theirs" / name), load(tmp_path / "ours" / name)
        assert list(their) == list(our)
        assert their["averaging_state"] == our["averaging_state"]
        assert differences(their["current_model_state"], our["current_model_state"]) == []
        assert differences(floats(their["state_dict"]), floats(our["state_dict"])) == []
        assert list(their["state_dict"]) == list(our["state_dict"])
        is_copy = our["averaging_state"]["n_averaged"] == 1
        assert (differences(our["state_dict"], our["current_model_state"]) == []) == is_copy


def test_the_mean_is_equal_to_the_bit(tmp_path: Path) -> None:
    arguments = {"multi_avg_fn": get_swa_multi_avg_fn(), "use_buffers": False}
    states = [
        own(fit(tmp_path, [kind.WeightAveraging(**arguments)]).lightning_module)
        for kind in (theirs, ours)
    ]
    assert differences(*states) == []


def test_the_default_differs_in_the_last_bits_alone(tmp_path: Path) -> None:
    """The mean. On a CPU the original's is another formula than on a GPU; ours is one."""
    their, our = (
        floats(own(fit(tmp_path, [kind.WeightAveraging()]).lightning_module))
        for kind in (theirs, ours)
    )
    torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)


def test_the_ema_callback_differs_in_the_last_bits_alone(tmp_path: Path) -> None:
    arguments = {
        "decay": 0.8,
        "update_every_n_steps": 3,
        "update_starting_at_step": 2,
        "update_starting_at_epoch": 1,
    }
    for name, kind in (("theirs", theirs), ("ours", ours)):
        callbacks = [kind.EMAWeightAveraging(**arguments), saving(tmp_path / name)]
        fit(tmp_path, callbacks, max_epochs=2)
    for path in (tmp_path / "theirs").iterdir():
        their, our = load(path), load(tmp_path / "ours" / path.name)
        assert their["averaging_state"] == our["averaging_state"]
        assert differences(their["current_model_state"], our["current_model_state"]) == []
        for state, expected in floats(their["state_dict"]).items():
            torch.testing.assert_close(our["state_dict"][state], expected, rtol=1e-6, atol=1e-7)


def test_a_function_that_is_not_known_runs_as_in_torch(tmp_path: Path) -> None:
    states = [
        own(fit(tmp_path, [kind.WeightAveraging(avg_fn=lambda a, m, n: a * 0.5 + m * 0.5)]).model)
        for kind in (theirs, ours)
    ]
    assert differences(*states) == []


@pytest.mark.parametrize("first, second", [(theirs, ours), (ours, theirs)], ids=["in", "out"])
def test_checkpoints_go_both_ways(tmp_path: Path, first: Any, second: Any) -> None:
    whole = fit(tmp_path, [ema(first), saving(tmp_path)], max_epochs=2).lightning_module
    path = tmp_path / f"step={BATCHES}.ckpt"
    loader = training()
    loader.load_state_dict({"epoch": 1, "position": 0})
    fitting = trainer(tmp_path, [ema(second)], max_epochs=2)
    fitting.fit(Digits(seed=1), loader, held_out(), ckpt_path=path, weights_only=False)
    assert fitting.global_step == 2 * BATCHES
    assert differences(floats(own(whole)), floats(own(fitting.lightning_module))) == []


def test_the_other_package_s_trainer_runs_it(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")

    class Model(other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    states = []
    for callback in (
        other.callbacks.EMAWeightAveraging(decay=0.8),
        ours.EMAWeightAveraging(decay=0.8),
    ):
        fitting = other.Trainer(
            accelerator="cpu",
            callbacks=[callback],
            max_steps=4,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Model()
        fitting.fit(model, training())
        states.append(own(model))
    torch.testing.assert_close(states[0], states[1])


# What is promised beyond.


def test_a_killed_training_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL in the second epoch, between two checkpoints; then a new process goes on."""
    folders = [tmp_path / name for name in ("whole", "broken")]
    script = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("lightning_run.py"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def process(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*script, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    folders[0].mkdir()
    run(folders[0])
    killed = process(folders[1], "--kill-after", BATCHES + 7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in folders[1].iterdir()}
    assert f"step={BATCHES + 6}.ckpt" in left and "result.pt" not in left
    resumed = process(folders[1], "--resume", folders[1] / f"step={BATCHES + 6}.ckpt")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (load(folder / "result.pt") for folder in folders)
    assert expected["step"] == found["step"] == 3 * BATCHES
    assert differences(expected["model"], found["model"]) == []
    for step in (2 * BATCHES, 2 * BATCHES + 4, 3 * BATCHES):
        expected, found = (load(folder / f"step={step}.ckpt") for folder in folders)
        for key in STATES:
            assert differences(expected[key], found[key]) == [], f"{key} after step {step}"
        assert (
            expected["callbacks"]["EMAWeightAveraging"] == found["callbacks"]["EMAWeightAveraging"]
        )


def test_checkpoints_are_chosen_by_the_averaged_metric(tmp_path: Path) -> None:
    chosen = saving(tmp_path, monitor="val_loss", save_top_k=1)
    fit(tmp_path, [ours.EMAWeightAveraging(decay=0.8), chosen], max_epochs=2)
    best = load(Path(chosen.best_model_path))
    score = float(chosen.best_model_score)
    assert loss_of(best["state_dict"]) == pytest.approx(score, rel=1e-6)
    assert abs(loss_of(best["current_model_state"]) - score) > 0.01


class Climbing(LightningModule):
    """Its one weight is the number of steps; validation reports it."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(()))
        self.count = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in [self.optimizers()] if self.count == 1 else self.optimizers():
            self.weight.grad = -torch.ones(())
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("weight", self.weight)

    test_step = validation_step

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(self.count)]


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
        average.append(floats(own(callback._average_model.module)))

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
    with pytest.warns(match="sharded models can't be averaged"):
        fit(tmp_path, [callback], Late(), limit_train_batches=2)
    assert callback._average_model.module.network is not None
    assert callback._average_model.n_averaged == 2


def test_a_used_callback_can_be_copied_and_pickled(tmp_path: Path) -> None:
    callback = ours.EMAWeightAveraging(decay=0.5)
    fit(tmp_path, [callback], Climbing(), limit_train_batches=3)
    callback._kwargs = {}  # torch's functions can't be pickled, ours no more than those
    callback._average_model.multi_avg_fn = None
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other._average_model.module.weight == 2.25
        assert other._model is None


def test_one_can_stand_for_the_other() -> None:
    callback = ours.EMAWeightAveraging()
    assert isinstance(callback, theirs.EMAWeightAveraging | theirs.WeightAveraging)
    assert callback.state_key == theirs.EMAWeightAveraging().state_key


# Bad input.


@pytest.mark.parametrize(
    "kind, arguments, error, message",
    [
        ("WeightAveraging", {"device": 1.5}, TypeError, r"device is 1\.5; a torch\.device"),
        ("WeightAveraging", {"device": True}, TypeError, r"device is True"),
        ("WeightAveraging", {"use_buffers": "no"}, TypeError, r"use_buffers is 'no'; True or"),
        ("WeightAveraging", {"decay": 0.9}, TypeError, r"got decay; .* avg_fn or multi_avg_fn"),
        ("WeightAveraging", {"avg_fn": 0.9}, TypeError, r"avg_fn is 0\.9; a function"),
        ("WeightAveraging", {"avg_fn": max, "multi_avg_fn": max}, ValueError, r"only one of them"),
        ("EMAWeightAveraging", {"avg_fn": max}, TypeError, r"got avg_fn; it averages by its decay"),
        ("EMAWeightAveraging", {"decay": 1.5}, ValueError, r"decay is 1\.5; a number in \[0, 1\]"),
        ("EMAWeightAveraging", {"decay": "0.9"}, TypeError, r"decay is '0\.9'; a number"),
        ("EMAWeightAveraging", {"update_every_n_steps": -1}, ValueError, r"at least 0"),
        ("EMAWeightAveraging", {"update_every_n_steps": 0}, ValueError, r"nothing would be"),
        ("EMAWeightAveraging", {"update_starting_at_step": 0.5}, TypeError, r"step is 0\.5; an in"),
        ("EMAWeightAveraging", {"update_starting_at_epoch": "1"}, TypeError, r"epoch is '1'; an"),
    ],
)
def test_wrong_arguments_are_named(
    kind: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(ours, kind)(**arguments)


def test_an_index_of_zero_is_a_device_where_theirs_takes_it_for_none() -> None:
    assert ours.WeightAveraging(0)._device == torch.device("cuda", 0)
    assert ours.WeightAveraging("cpu")._device == torch.device("cpu")


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several WeightAveraging callbacks"):
        fit(tmp_path, [ema(ours), ours.EMAWeightAveraging()])


def test_a_model_that_changes_while_it_trains_is_named(tmp_path: Path) -> None:
    def grow(trainer: Any, module: Any) -> None:
        if trainer.global_step == 1:
            module.network.append(nn.Linear(10, 10))

    with pytest.raises(KeyError, match=r"unexpected in the model: network\.6\.weight"):
        fit(tmp_path, [ema(ours), Calls("on_train_batch_end", grow)])


def test_a_missing_lightning_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, f"{package}.callbacks.weight_averaging", None)
    with pytest.raises(ImportError, match=r"pip install 'ema_fused\[lightning\]'"):
        ours._originals()
