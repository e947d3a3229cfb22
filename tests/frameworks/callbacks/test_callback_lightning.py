"""ema_fused.callbacks.lightning beside Lightning's own callbacks, under its real trainer."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as theirs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_swa_multi_avg_fn

from ema_fused.callbacks import lightning as ours
from ema_fused.callbacks.lightning_originals import originals
from tests.frameworks.callbacks.lightning_cases import (
    QUIET,
    Calls,
    Scores,
    ema,
    fit,
    load,
    saving,
)
from tests.frameworks.callbacks.lightning_run import BATCHES, Digits, held_out, trainer, training
from tests.networks import differences, floating, own

pytestmark = QUIET


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
    # Without batch norm's counter: torch averages it and cuts off what is behind the point.
    assert differences(*map(floating, models)) == []
    written = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert written == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(written) >= 3
    for name in written:
        their, our = load(tmp_path / "theirs" / name), load(tmp_path / "ours" / name)
        assert list(their) == list(our)
        assert their["averaging_state"] == our["averaging_state"]
        assert differences(their["current_model_state"], our["current_model_state"]) == []
        assert differences(floating(their["state_dict"]), floating(our["state_dict"])) == []
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
        floating(own(fit(tmp_path, [kind.WeightAveraging()]).lightning_module))
        for kind in (theirs, ours)
    )
    torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)


def test_the_ema_callback_is_equal_to_the_bit(tmp_path: Path) -> None:
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
        assert differences(floating(their["state_dict"]), floating(our["state_dict"])) == []


class Masked(Digits):
    """With a causal mask of -inf, and the range of an observer that has seen nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor
        self.range: Tensor
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("range", torch.tensor([torch.inf, -torch.inf]))

    def _score(self, name: str, batch: Any) -> None:
        super()._score(name, batch)
        self.log("attention", (self.mask.softmax(1) ** 2).sum())


def test_infinite_buffers_stay_what_the_original_makes_of_them(tmp_path: Path) -> None:
    scores, models = [], []
    for kind in (theirs, ours):
        seen: list[dict[str, float]] = []

        def keep(trainer: Any, _: Any, seen: list[dict[str, float]] = seen) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

        callbacks = [kind.EMAWeightAveraging(decay=0.8), Calls("on_validation_end", keep)]
        fitted = fit(tmp_path, callbacks, Masked(), max_epochs=2)
        scores.append(seen)
        models.append(own(fitted.lightning_module))
    assert scores[0] == scores[1]
    assert all(math.isfinite(score) for seen in scores[1] for score in seen.values())
    assert differences(*map(floating, models)) == []
    assert torch.equal(models[1]["mask"], Masked().mask)


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
    assert differences(floating(own(whole)), floating(own(fitting.lightning_module))) == []


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
        originals()
