"""The config for mmengine trains, validates, saves and resumes, as its user would run it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT, processes

pytest.importorskip("sklearn", reason="the example's data ship with scikit-learn")

EXAMPLES = ROOT / "examples"
CONFIG = EXAMPLES / "mmengine_digits.py"
EPOCHS = 4


@dataclass(frozen=True)
class Run:
    """One run of the command: its folder, and what it printed."""

    folder: Path
    output: str

    @functools.cached_property
    def checkpoint(self) -> dict[str, Any]:
        """The one after the last epoch."""
        path = self.folder / f"epoch_{EPOCHS}.pth"
        found: dict[str, Any] = torch.load(path, weights_only=False)
        return found

    def accuracies(self) -> list[float]:
        """Of each validation in the log."""
        return [float(v) for v in re.findall(r"Epoch\(val\).+accuracy: ([\d.]+)", self.output)]


def start(config: Path, folder: Path, epochs: int, *options: str) -> processes.Fork:
    command = [EXAMPLES / "mmengine_train.py", config, *options, "--work-dir", folder]
    # The script is to see to what torch asks of those who resume.
    removed = {name: None for name in os.environ if "WEIGHTS_ONLY" in name}
    # One thread: the runs share the machine, and sums are to be in one order in all of them.
    environment = {"OMP_NUM_THREADS": "1", **removed}
    length = f"train_cfg.max_epochs={epochs}"
    with processes.without_transformers():
        return processes.fork("mmengine.runner", *command, "--cfg-options", length, **environment)


def finish(running: processes.Fork, folder: Path) -> Run:
    return Run(folder, processes.finish(running).stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """``whole``: in one go; ``resumed``: after half of it in a process before; ``mmengine``: the
    config with mmengine's own hook."""
    folder = tmp_path_factory.mktemp("runs")
    other_config = folder / "mmengine_digits.py"
    other_config.write_text(with_the_hook_of_mmengine(), encoding="utf-8")
    running = {
        "whole": start(CONFIG, folder / "whole", EPOCHS),
        "mmengine": start(other_config, folder / "mmengine", EPOCHS),
        "resumed": start(CONFIG, folder / "resumed", EPOCHS // 2),
    }
    try:
        half = finish(running["resumed"], folder / "resumed")
        assert len(half.accuracies()) == EPOCHS // 2
        running["resumed"] = start(CONFIG, folder / "resumed", EPOCHS, "--resume")
        yield {name: finish(process, folder / name) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()


def with_the_hook_of_mmengine() -> str:
    """The config's text, changed in one line."""
    text = CONFIG.read_text(encoding="utf-8")
    changed = text.replace('"ema_fused.hooks.mmengine.EMAHook"', '"EMAHook"')
    lines = zip(text.splitlines(), changed.splitlines(), strict=True)
    assert sum(before != after for before, after in lines) == 1
    return changed


def assert_same_bits(found: Any, wanted: Any, where: str) -> None:
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_same_bits(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same_bits(*pair, f"{where}.{index}")
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype, where
        assert found.shape == wanted.shape, where
        assert found.numpy().tobytes() == wanted.numpy().tobytes(), where
    else:
        assert found == wanted, where


def assert_same_checkpoints(found: Run, wanted: Run) -> None:
    for part in ("state_dict", "ema_state_dict", "optimizer"):
        assert_same_bits(found.checkpoint[part], wanted.checkpoint[part], part)


def test_the_average_is_validated_saved_and_compared(runs: dict[str, Run]) -> None:
    whole = runs["whole"]
    accuracies = whole.accuracies()
    assert len(accuracies) == EPOCHS
    assert accuracies[-1] > 85, "chance is 10 %"

    table = re.findall(r"^(averaged|the model's own) +\S+ ([\d.]+)$", whole.output, re.MULTILINE)
    assert [kind for kind, _ in table] == ["averaged", "the model's own"]
    averaged, own = (float(value) for _, value in table)
    assert averaged == pytest.approx(accuracies[-1], abs=0.01), "what was validated is what is kept"
    assert own > 85

    state, ema_state = whole.checkpoint["state_dict"], whole.checkpoint["ema_state_dict"]
    batches = 57  # of 16 images in the half of 1,797 that is trained on
    assert ema_state["steps"] == EPOCHS * batches
    assert set(ema_state) == {"steps", *(f"module.{name}" for name in state)}
    for name, tensor in state.items():
        assert not torch.equal(tensor, ema_state[f"module.{name}"]), name


def test_a_resumed_training_ends_with_the_same_bits(runs: dict[str, Run]) -> None:
    assert f"resumed epoch: {EPOCHS // 2}" in runs["resumed"].output
    assert runs["resumed"].accuracies() == runs["whole"].accuracies()[EPOCHS // 2 :]
    assert_same_checkpoints(runs["resumed"], runs["whole"])


def test_one_line_of_the_config_is_all_that_differs_from_mmengines_own_hook(
    runs: dict[str, Run],
) -> None:
    assert "ema_fused" in runs["whole"].checkpoint["meta"]["cfg"]
    assert "ema_fused.hooks" not in runs["mmengine"].checkpoint["meta"]["cfg"]
    assert runs["mmengine"].accuracies() == runs["whole"].accuracies()
    assert_same_checkpoints(runs["mmengine"], runs["whole"])
