"""The example trains, averages and reports what it says, on the real data."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT, processes
from tests.device import needs

pytest.importorskip("sklearn", reason="the example's data ship with scikit-learn")
pytest.importorskip("matplotlib", reason="the example draws with matplotlib")
pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

EXAMPLES = ROOT / "examples"
COMMAND = [EXAMPLES / "digits.py", "--quick", "--epochs", 2, "--seeds", 1, "--output"]


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """The example as a module, on one thread of the CPU."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example: Any = importlib.import_module("digits")
    monkeypatch.setattr(example, "DEVICE", torch.device("cpu"))
    return example


def test_command_prints_both_tables_and_draws_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    done = processes.run(*COMMAND, picture)
    assert "2/2" in done.stderr, "the progress bar counts epochs to the end"
    assert str(picture) in done.stdout

    for kind in ("raw", "EMA", "SWA"):
        row = re.search(rf"^{kind} +([\d.]+) ± ([\d.]+) % +([\d.]+) ± ", done.stdout, re.MULTILINE)
        assert row is not None, done.stdout
        assert 0 <= float(row[1]) <= 100
        assert float(row[2]) == 0, "one seed has no spread"
        assert row[3] == row[1], "of two epochs, the last quarter is the last one"

    costs = re.findall(r"^(.+?) +([\d.]+) us +([\d.]+) % +([\d.]*)$", done.stdout, re.MULTILINE)
    medians = {name: float(median) for name, median, _, _ in costs}
    assert len(medians) == 5
    assert all(median > 0 for median in medians.values())
    ratios = {name: ratio for name, _, _, ratio in costs}
    assert ratios["ema_fused, update_parameters"] == "1.00"

    with picture.open("rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    pixels = importlib.import_module("matplotlib.image").imread(picture)
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 600
    colours = {tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::7].tolist()}
    assert len(colours) > 20, "an empty picture has fewer"


@pytest.mark.parametrize("option", ["--epochs", "--seeds"])
@pytest.mark.parametrize("program", ["digits", "merging_digits"])
def test_command_refuses_to_do_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    option: str,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", option, "0"])
    with pytest.raises(SystemExit):
        importlib.import_module(program).main()
    assert f"{option}: 0 is less than 1" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_trained_on_and_named(tmp_path: Path) -> None:
    needs("a GPU by name")
    done = processes.run(*COMMAND, tmp_path / "curves.png")
    assert f"Trained on {torch.cuda.get_device_name(0)} " in done.stdout
    assert re.search(r"^EMA +[\d.]+ ± ", done.stdout, re.MULTILINE)


def test_data_are_the_real_digits_in_two_disjoint_halves(digits: Any) -> None:
    training, test = digits.load_data(seed=3)
    assert len(training) + len(test) == 1797
    assert abs(len(training) - len(test)) == 1
    images, labels = (torch.cat(pair) for pair in zip(training.tensors, test.tensors, strict=True))
    assert images.shape == (1797, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # As a set the images are those of the whole: none is in both halves.
    whole = importlib.import_module("sklearn.datasets").load_digits().images / 16
    assert torch.equal(
        images.flatten(1).sum(1).sort().values,
        torch.tensor(whole, dtype=torch.float32).flatten(1).sum(1).sort().values,
    )
    again, _ = digits.load_data(seed=3)
    other, _ = digits.load_data(seed=4)
    assert torch.equal(training.tensors[0], again.tensors[0])
    assert not torch.equal(training.tensors[0], other.tensors[0])


def test_training_repeats_itself_and_averaging_pays(digits: Any) -> None:
    epochs: list[None] = []
    curves = digits.train(seed=0, epochs=8, progress=lambda: epochs.append(None))
    assert len(epochs) == 8
    assert [len(curve) for curve in curves.values()] == [8, 8, 8]
    assert [math.isnan(value) for value in curves["SWA"]] == [True] * 2 + [False] * 6
    # Far above chance (10 %); the averages smooth what the raw weights' accuracy jumps about.
    assert min(curves["EMA"][-1], curves["SWA"][-1]) > 90
    mean = {kind: sum(curve[-4:]) / 4 for kind, curve in curves.items()}
    assert mean["EMA"] > mean["raw"]
    assert mean["SWA"] > mean["raw"]
    again = digits.train(seed=0, epochs=2, progress=lambda: None)
    # Not all of it compares: with two epochs in all, SWA starts at the first.
    assert again["raw"] == curves["raw"][:2]
    assert again["EMA"] == curves["EMA"][:2]


def test_training_leaves_no_averaged_weights_behind(
    digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The raw curve is what it would be if nobody averaged: evaluating swaps back exactly."""
    curves = digits.train(seed=1, epochs=2, progress=lambda: None)

    class NoAverage:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def update_parameters(self, _: Any) -> None:
            pass

        def swapped(self, _: Any) -> Any:
            return importlib.import_module("contextlib").nullcontext()

    monkeypatch.setattr(digits, "ExponentialMovingAverage", NoAverage)
    monkeypatch.setattr(digits, "StochasticWeightAverage", NoAverage)
    alone = digits.train(seed=1, epochs=2, progress=lambda: None)
    assert alone["raw"] == curves["raw"]


def test_the_four_measured_updates_do_the_same_work(digits: Any) -> None:
    torch.manual_seed(0)
    model = digits.build_network()
    with torch.no_grad():
        contenders = digits.updates(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
        for update, _ in contenders.values():
            update()
    results = [averaged for _, averaged in contenders.values()]
    assert len(results) == 4
    assert not torch.equal(results[0][0], next(model.parameters()))
    for ours, hand, torchs, loop in zip(*results, strict=True):
        assert torch.equal(ours, hand)
        assert torch.equal(ours, loop)
        assert torch.equal(ours, torchs) or not ours.is_floating_point()


def test_averaged_curves_are_drawn_from_where_they_start(digits: Any, tmp_path: Path) -> None:
    nan = float("nan")
    run = {"raw": [91.0, 95.0], "EMA": [92.0, 96.0], "SWA": [nan, 97.0]}
    digits.draw([run, run], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    table = digits.accuracy_table([run, {**run, "raw": [91.0, 97.0]}])
    assert re.search(r"^raw +96\.00 ± 1\.41 %", table, re.MULTILINE)
    assert re.search(r"^SWA +97\.00 ± 0\.00 %", table, re.MULTILINE)
