"""Our callback in transformers' real Trainer, on digits, beside averages computed by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from ema_fused import ExponentialMovingAverage, StochasticWeightAverage
from ema_fused.callbacks.huggingface import EMACallback
from tests.frameworks.callbacks.huggingface_cases import (
    MOMENTUM,
    ByHand,
    Tensors,
    assert_measured_with,
    attached,
    averages,
    metrics_of,
)
from tests.frameworks.callbacks.huggingface_run import (
    EVALUATION,
    TRAINING,
    Digits,
    digits_trainer,
)
from tests.networks import differences, floating, overflow_at, own, snapshot


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_average_is_the_one_by_hand_to_the_bit(tmp_path: Path, accumulation: int) -> None:
    by_hand = ByHand()
    callback, trainer = attached(
        tmp_path, by_hand, gradient_accumulation_steps=accumulation, max_steps=11
    )
    trainer.train()
    assert callback.average is not None
    assert callback.average.steps == by_hand.steps == trainer.state.global_step == 11
    assert differences(averages(callback), by_hand.average) == []
    assert differences(own(trainer.model), by_hand.average) != []


def test_the_average_changes_nothing_in_training(tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 3}
    _, trainer = attached(tmp_path, **arguments)
    trainer.train()
    alone = digits_trainer(tmp_path, **arguments)  # which seeds the random numbers of its training
    alone.train()
    assert differences(own(trainer.model), own(alone.model)) == []


def test_other_kinds_of_average_and_functions(tmp_path: Path) -> None:
    for average, arguments in [
        (StochasticWeightAverage, {"interval": 2}),
        (lambda model: StochasticWeightAverage(model, interval=2), {}),
    ]:
        trainer = digits_trainer(tmp_path, max_steps=5)
        callback = EMACallback(average, **arguments).attach(trainer)
        trainer.train()
        assert type(callback.average) is StochasticWeightAverage
        assert callback.average.interval == 2
        assert callback.average.steps == 5


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])  # the latter is the default
def test_steps_that_a_gradient_scaler_skips_are_not_counted(tmp_path: Path, optim: str) -> None:
    by_hand = ByHand()
    callback, trainer = attached(tmp_path, by_hand, optim=optim, max_grad_norm=0.0, max_steps=12)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    overflow_at(trainer.model.conv.weight, {0, 4, 5})
    trainer.train()
    assert callback.average is not None
    assert by_hand.steps == 9
    assert trainer.state.global_step == 12
    assert callback.average.steps == by_hand.steps
    assert differences(averages(callback), by_hand.average) == []


def test_evaluations_in_training_measure_the_average(tmp_path: Path) -> None:
    by_hand = ByHand()
    callback, trainer = attached(
        tmp_path, by_hand, eval_strategy="steps", eval_steps=4, eval_on_start=True
    )
    start = own(trainer.model)
    trainer.train()
    log = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in log] == [0, 4, 8, 12]
    assert_measured_with(start, log[0])
    evaluations = by_hand.at_evaluations[1:]
    for (model, average, metrics), line in zip(evaluations, log[1:], strict=True):
        assert_measured_with(average, metrics)
        assert_measured_with(average, line)
        # The model had its own weights again before other callbacks were called.
        assert metrics_of(model) != pytest.approx(metrics_of(average), rel=1e-3)
    assert differences(averages(callback), by_hand.average) == []


def test_evaluate_and_predict_after_training_measure_the_average(tmp_path: Path) -> None:
    callback, trainer = attached(tmp_path)
    before = own(trainer.model)
    assert_measured_with(before, trainer.evaluate())  # no average yet
    trainer.train()
    weights, average = own(trainer.model), averages(callback)
    assert_measured_with(average, trainer.evaluate())
    predicted = trainer.predict(Digits(EVALUATION))
    assert_measured_with(average, {k.replace("test", "eval"): v for k, v in predicted[2].items()})
    several = trainer.evaluate({"a": Digits(EVALUATION), "b": Digits(TRAINING)})
    assert several["eval_a_loss"] == pytest.approx(metrics_of(average)["eval_loss"])
    assert several["eval_b_loss"] == pytest.approx(metrics_of(average, TRAINING)["eval_loss"])
    with callback.swapped() as model:
        assert differences(snapshot(model), average) == []
    assert differences(own(trainer.model), weights) == []
    assert differences(averages(callback), average) == []
    trainer.remove_callback(callback)
    assert_measured_with(weights, trainer.evaluate())


def test_an_evaluation_that_raises_leaves_no_averages_in_the_model(tmp_path: Path) -> None:
    def broken(_: object) -> dict[str, float]:
        raise OSError("metrics are out of reach")

    by_hand = ByHand()
    callback, trainer = attached(tmp_path, by_hand, eval_strategy="steps", eval_steps=4)
    measure, trainer.compute_metrics = trainer.compute_metrics, broken
    with pytest.raises(OSError, match="out of reach"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert differences(averages(callback), by_hand.average) == []
    alone = digits_trainer(tmp_path, max_steps=4)
    alone.train()
    assert differences(own(trainer.model), own(alone.model)) == []
    trainer.compute_metrics = measure
    assert_measured_with(by_hand.average, trainer.evaluate())


def first_worse(losses: list[float]) -> int | None:
    best = [min(losses[:i]) for i in range(1, len(losses))]
    return next((i for i, b in enumerate(best, 1) if losses[i] >= b), None)


@pytest.mark.parametrize("momentum", [0.05, 0.2])
def test_best_model_and_early_stopping_go_by_the_average(tmp_path: Path, momentum: float) -> None:
    """At this learning rate the loss of the model goes up again soon, and the average's later."""
    by_hand = ByHand(momentum)
    trainer = digits_trainer(
        tmp_path,
        callbacks=[by_hand, EarlyStoppingCallback(early_stopping_patience=1)],
        learning_rate=3.0,
        max_steps=32,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    callback = EMACallback(momentum=momentum, update_buffers=True).attach(trainer)
    trainer.train()
    raw = [metrics_of(model)["eval_loss"] for model, _, _ in by_hand.at_evaluations]
    averaged = [metrics_of(average)["eval_loss"] for _, average, _ in by_hand.at_evaluations]
    best, stopped = averaged.index(min(averaged)), first_worse(averaged)
    assert first_worse(raw) not in (None, stopped)
    assert trainer.state.global_step == (32 if stopped is None else 4 * (stopped + 1))
    assert trainer.state.best_global_step == 4 * (best + 1)
    assert trainer.state.best_metric == pytest.approx(averaged[best], rel=1e-5)
    # Model and average are both of that step, and each is what it was.
    model, average, _ = by_hand.at_evaluations[best]
    assert differences(own(trainer.model), model) == []
    assert differences(averages(callback), average) == []
    assert_measured_with(average, trainer.evaluate())


def test_each_training_starts_a_new_average(tmp_path: Path) -> None:
    callback, trainer = attached(tmp_path, max_steps=3)
    trainer.train()
    first = callback.average
    trainer.train()
    assert callback.average is not first
    assert callback.average is not None and callback.average.steps == 3


def test_evaluation_in_sixteen_bits_leaves_the_average_alone(tmp_path: Path) -> None:
    callback, trainer = attached(tmp_path, bf16_full_eval=True)
    trainer.train()
    weights, average = own(trainer.model), averages(callback)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics_of(average)["eval_loss"], rel=0.02)
    assert differences(averages(callback), average) == []
    # The trainer leaves the model in bfloat16, with an average or without.
    assert all(
        torch.equal(trainer.model.state_dict()[name], tensor.bfloat16())
        for name, tensor in floating(weights).items()
    )


# Bad input.


def test_arguments_are_checked_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match=r"momentum is 2; a number in"):
        EMACallback(momentum=2)
    with pytest.raises(TypeError, match="momentums"):
        EMACallback(momentums=0.1)
    with pytest.raises(TypeError, match=r"average is 0\.001; .*momentum=0\.001"):
        EMACallback(0.001)  # type: ignore[arg-type]


def test_making_a_callback_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    EMACallback(momentum=0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_callback_that_is_not_attached_is_refused(tmp_path: Path) -> None:
    trainer = digits_trainer(tmp_path, callbacks=[EMACallback()])
    with pytest.raises(RuntimeError, match=r"call callback\.attach\(trainer\)"):
        trainer.train()


def test_a_callback_passed_to_the_trainer_is_not_added_again(tmp_path: Path) -> None:
    callback = EMACallback()
    trainer = digits_trainer(tmp_path, callbacks=[callback], max_steps=3)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert callback.average is not None and callback.average.steps == 3


def test_wrong_ways_to_attach_are_refused(tmp_path: Path) -> None:
    callback, trainer = attached(tmp_path)
    with pytest.raises(RuntimeError, match="no average before"):
        callback.swapped()
    with pytest.raises(RuntimeError, match="attached to a trainer already"):
        callback.attach(trainer)
    with pytest.raises(RuntimeError, match="another EMACallback"):
        EMACallback().attach(trainer)
    with pytest.raises(
        TypeError, match=r"given a TrainingArguments without train, evaluation_loop"
    ):
        EMACallback().attach(TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    sharded = digits_trainer(tmp_path)
    sharded.is_fsdp_xla_enabled = True
    with pytest.raises(NotImplementedError, match="FSDP of XLA"):
        EMACallback().attach(sharded)
    assert all(not isinstance(c, EMACallback) for c in sharded.callback_handler.callbacks)


def test_a_function_that_makes_something_else_is_refused(tmp_path: Path) -> None:
    trainer = digits_trainer(tmp_path)
    EMACallback(lambda model: model).attach(trainer)
    with pytest.raises(TypeError, match="returned a DigitsModel; an averaged model is expected"):
        trainer.train()


def test_a_trainer_of_another_class_keeps_its_methods(tmp_path: Path) -> None:
    inside: list[Tensors] = []

    class Loud(Trainer):  # type: ignore[misc]
        def evaluation_loop(self, *positional: Any, **named: Any) -> Any:
            inside.append(snapshot(self.model))
            return super().evaluation_loop(*positional, **named)

    trainer = digits_trainer(tmp_path, trainer_class=Loud, max_steps=3)
    callback = EMACallback(ExponentialMovingAverage, momentum=MOMENTUM).attach(trainer)
    trainer.train()
    average = averages(callback)
    trainer.evaluate()
    assert [differences(weights, average) for weights in inside] == [[]]


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for module in ("huggingface", "huggingface_files"):
        monkeypatch.delitem(sys.modules, f"ema_fused.callbacks.{module}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'ema_fused\[transformers\]'"):
        importlib.import_module("ema_fused.callbacks.huggingface")
