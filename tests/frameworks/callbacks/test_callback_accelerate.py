"""Our averages in loops of accelerate's real Accelerator, on digits, beside plain torch."""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ema_fused import ExponentialMovingAverage, PowerFunctionEMA
from ema_fused.callbacks.accelerate import register_average, update_average
from tests import processes
from tests.digits import digits
from tests.frameworks.callbacks import accelerate_run
from tests.frameworks.callbacks.accelerate_run import Training, network
from tests.networks import differences, overflow_at, own

Tensors = dict[str, Tensor]


def moved(average: Tensors, model: nn.Module) -> Tensors:
    """The next average, in plain torch."""
    return {
        name: torch.lerp(average[name], new, 0.1) if average and new.is_floating_point() else new
        for name, new in own(model).items()
    }


def test_the_average_is_the_one_by_hand_to_the_bit() -> None:
    training = Training()
    by_hand: Tensors = {}
    for _ in range(3):
        updated = []
        for batch, was_updated in training.epoch():
            if batch in (2, 5, 8, 9):  # the last batch of an epoch ends an accumulation
                by_hand = moved(by_hand, training.plain_model)
            updated += [batch] * was_updated
        assert updated == [2, 5, 8, 9]
        assert differences(own(training.average.module), by_hand) == []
    assert training.average.steps == 12


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_are_not_counted(fused: bool) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    training = Training(accelerator, fused=fused)
    overflow_at(training.plain_model[0].weight, {0, 4, 8})
    updated, theirs = [], []
    for batch, was_updated in training.epoch():
        updated += [batch] * was_updated
        theirs += [batch] * (not training.optimizer.step_was_skipped)
    assert updated == [1, 2, 3, 5, 6, 7, 9]
    assert training.average.steps == 7
    # A fused optimizer is called for skipped steps too, and accelerate takes them for real ones.
    assert theirs == (list(range(10)) if fused else updated)


def test_a_fused_optimizer_may_have_stepped_before_the_first_update() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    training = Training(accelerator, fused=True)
    overflow_at(training.plain_model[0].weight, {0, 3})
    model, optimizer = training.model, training.optimizer
    counts = []
    for number, (images, labels) in enumerate(training.batches):
        accelerator.backward(cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
        if number >= 2:
            counts.append(update_average(accelerator, training.average, model))
    assert counts == [True, False] + [True] * 6


def test_evaluation_and_files_have_the_average(tmp_path: Path) -> None:
    training = Training()
    for _ in training.epoch():
        pass
    weights, average = own(training.plain_model), own(training.average.module)
    alone = network()
    alone.load_state_dict(average)
    images, _ = digits(1000, 1400)
    expected = alone.eval()(images)
    training.model.eval()
    assert not torch.equal(training.model(images), expected)
    with training.average.swapped(training.model) as model:
        assert torch.equal(model(images), expected)
    with pytest.raises(OSError), training.average.swapped(training.model):
        raise OSError
    assert differences(own(training.plain_model), weights) == []
    assert differences(own(training.average.module), average) == []
    training.accelerator.save_model(training.average.module, tmp_path)
    assert differences(load_file(tmp_path / "model.safetensors"), average) == []


def test_wrapped_models_are_averaged_and_swapped() -> None:
    """As ``prepare`` wraps them for several processes."""
    training = Training()
    wrapped = nn.DataParallel(training.plain_model)
    for _ in range(2):
        assert update_average(training.accelerator, training.average, wrapped)
    assert training.average.steps == 2
    assert differences(own(training.average.module), own(training.plain_model)) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_of_a_time_without_the_average_begins_one(
    tmp_path: Path, compiled: bool
) -> None:
    def begun(seed: int) -> tuple[Accelerator, nn.Module, ExponentialMovingAverage]:
        torch.manual_seed(seed)
        accelerator = Accelerator(cpu=True)
        plain = network()
        average = ExponentialMovingAverage(plain, momentum=0.1)
        model = torch.compile(plain, backend="eager") if compiled else plain
        return accelerator, accelerator.prepare(model), average

    accelerator, model, _ = begun(0)
    accelerator.save_state(str(tmp_path / "without"))
    before = own(model)
    accelerator, model, average = begun(1)
    register_average(accelerator, average, model)
    with pytest.warns(
        UserWarning, match=r"without has no average \(no folder 'averaged'\)"
    ) as told:
        accelerator.load_state(str(tmp_path / "without"))
    assert sum("no average" in str(one.message) for one in told) == 1
    begun_from = own(average.module)
    assert len(begun_from) == len(before)
    assert all(map(torch.equal, begun_from.values(), before.values()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for _ in range(2):
        assert update_average(accelerator, average, model)
    accelerator.save_state(str(tmp_path / "with"))
    kept = own(average)
    model.load_state_dict(model.state_dict())  # no more than once
    assert differences(own(average), kept) == []
    accelerator, model, average = begun(2)
    register_average(accelerator, average, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no average.*")
        accelerator.load_state(str(tmp_path / "with"))
    assert differences(own(average), kept) == []
    assert average.steps == 2


def test_several_widths_are_averaged_saved_and_resumed(tmp_path: Path) -> None:
    """A ``PowerFunctionEMA`` beside the average of the loop, in the same checkpoints."""
    training, by_hand = Training(), None
    ema = PowerFunctionEMA(training.plain_model)
    training.accelerator.register_for_checkpointing(ema)
    steps = []
    for batch, was_updated in training.epoch():
        steps += [batch] * update_average(training.accelerator, ema, training.model)
        if was_updated:
            by_hand = by_hand or PowerFunctionEMA(training.plain_model)
            by_hand.update_parameters(training.plain_model)
    assert steps == [2, 5, 8, 9]
    assert by_hand is not None and (ema.steps, ema.time) == (4, 4)
    for width in ema.sigma_rel:
        assert differences(ema.average(width), by_hand.average(width)) == []
    training.accelerator.save_state(str(tmp_path))
    again = Training()
    loaded = PowerFunctionEMA(again.plain_model)
    again.accelerator.register_for_checkpointing(loaded)
    again.accelerator.load_state(str(tmp_path))
    assert (loaded.steps, loaded.time, loaded.run) == (4, 4, ema.run)
    for width in ema.sigma_rel:
        assert differences(loaded.average(width), ema.average(width)) == []
    weights = own(again.plain_model)
    with loaded.swapped(again.model, sigma_rel=0.1):
        inside = {name: p.clone() for name, p in again.plain_model.named_parameters()}
    held = loaded.average(0.1)
    assert differences(inside, {name: held[name] for name in inside}) == []
    assert differences(own(again.plain_model), weights) == []


def test_a_killed_run_is_resumed_to_the_bit(tmp_path: Path) -> None:
    whole_folder, folder = tmp_path / "whole", tmp_path / "killed"
    killed = processes.fork("accelerate", accelerate_run.__file__, folder, "--kill-at", 17)
    whole = torch.load(accelerate_run.run(whole_folder))
    processes.finish(killed, -signal.SIGKILL)
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]
    processes.run_fork("accelerate", accelerate_run.__file__, folder, "--resume")
    end = torch.load(folder / "end.pt")
    assert whole["average"]["steps"] == 12
    for part in ("model", "average"):
        assert differences(end[part], whole[part]) == []


def test_checkpoints_are_refused_while_averages_are_swapped_in(tmp_path: Path) -> None:
    training = Training()
    with (
        training.average.swapped(training.model),
        pytest.raises(RuntimeError, match="while averaged weights are swapped in"),
    ):
        training.accelerator.save_state(str(tmp_path))


def test_wrong_arguments_are_refused() -> None:
    training = Training()
    accelerator, average, model = training.accelerator, training.average, training.model
    with pytest.raises(
        TypeError, match=r"accelerator is a ExponentialMovingAverage; an accelerate"
    ):
        update_average(average, average, model)
    with pytest.raises(TypeError, match="average is a Sequential; an averaged model is expected"):
        update_average(accelerator, model, average)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        update_average(accelerator, ExponentialMovingAverage(nn.Linear(1, 1)), model)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ema_fused.callbacks.accelerate")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'ema_fused\[accelerate\]'"):
        importlib.import_module("ema_fused.callbacks.accelerate")
