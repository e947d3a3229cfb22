"""The example that merges checkpoints does what it says, on the real data."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_fused.merging import weights_of
from tests import ROOT, processes

pytest.importorskip("sklearn", reason="the example's data ship with scikit-learn")
pytest.importorskip("matplotlib", reason="the example draws with matplotlib")
pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """The example as a module, on one thread of the CPU."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(importlib.import_module("digits"), "DEVICE", torch.device("cpu"))
    return importlib.import_module("merging_digits")


def test_the_command_prints_the_table_and_draws_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "merging.png"
    done = processes.run(
        EXAMPLES / "merging_digits.py", "--epochs", 2, "--seeds", 1, "--output", picture
    )
    rows = dict(re.findall(r"^(\S.*?) +([\d.]+) ± 0\.00 %$", done.stdout, re.MULTILINE))
    assert list(rows) == [
        "the last checkpoint",
        "mean",
        "linear",
        "minus-sqrt",
        "ema:0.8",
        "power:0.1",
        "decayed, a run of its own",
    ]
    assert all(50 < float(value) <= 100 for value in rows.values())
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_merging_pays_as_a_decay_does(example: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    found, weights = example.compare(0, 4, folder)
    steps = [28 * half for half in range(4, 9)]
    paths = [folder / f"step-{step}.pt" for step in steps]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert weights == {one: weights_of(one, 5, steps) for one in example.SCHEDULES}
    training = example.Training(0)
    reached = []
    for path in paths:
        training.model.load_state_dict(torch.load(path, weights_only=True))
        reached.append(training.accuracy())
    assert reached[-1] == found[example.LAST]
    assert reached[0] != found[example.DECAYED]  # that run went on from there
    typical = sum(reached) / len(reached)  # one by one they jump about
    assert found["mean"] == found["linear"]  # those weights are the same
    assert found["mean"] > typical and found[example.DECAYED] > typical


def test_the_merged_weights_are_the_weighted_sum(example: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    model = importlib.import_module("digits").build_network()
    states = []
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        states.append({name: one.clone() for name, one in model.state_dict().items()})
        torch.save(states[-1], folder / f"step-{step}.pt")
    weights = example.merge_into(model, folder, "minus-sqrt")
    for name, parameter in model.named_parameters():
        expected = sum(weight * state[name] for weight, state in zip(weights, states, strict=True))
        torch.testing.assert_close(parameter.detach(), expected)
