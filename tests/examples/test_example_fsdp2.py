"""The language model is trained on two processes, evaluated by one, and resumed by one."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT, processes
from tests.ranks import Ranks

pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

EXAMPLES = ROOT / "examples"
EXAMPLE = str(EXAMPLES / "fsdp2_language_model.py")
SHAPE = {"layers": 2, "heads": 2, "width": 32, "context": 64}
SETTINGS = {**SHAPE, "batch": 4, "lr": 0.01, "momentum": 0.3}
TINY = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Run:
    """What one start of the command printed."""

    output: str
    errors: str

    @property
    def losses(self) -> dict[str, float]:
        rows = re.findall(r"^(raw|averaged) +([\d.]+) +[\d.]+$", self.output, re.MULTILINE)
        return {kind: float(loss) for kind, loss in rows}

    @property
    def steps(self) -> int:
        found = re.search(r"Held-out text after (\d+) steps", self.output)
        assert found is not None, self.output
        return int(found[1])


def run(*arguments: str, ranks: int | None = None) -> Run:
    """Started as its user would: by torchrun, or as a plain program."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    program = [*(launcher if ranks else []), EXAMPLE, *arguments]
    done = processes.run_fork("torch", *program, OMP_NUM_THREADS="1")
    return Run(done.stdout, done.stderr)


def test_two_processes_train_one_evaluates_and_one_goes_on(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    trained = run(*TINY, "--steps", "12", "--output", folder, ranks=2)
    assert "12/12" in trained.errors, "the progress bar counts steps to the end"
    assert f"Checkpoint: {folder}" in trained.output
    assert trained.steps == 12
    assert [*trained.losses] == ["raw", "averaged"]
    # Guessing one of 256 costs log(256) = 5.545; in so short a training the average lags behind.
    assert trained.losses["raw"] < trained.losses["averaged"] < 5

    alone = run("--evaluate", folder)
    assert alone.steps == 12
    assert alone.losses == pytest.approx(trained.losses, abs=3e-5)

    resumed = run(*TINY, "--steps", "15", "--output", folder, ranks=1)
    assert re.search(r"\b12/15 ", resumed.errors), "it begins where the other ended"
    assert resumed.steps == 15
    assert resumed.losses["averaged"] < trained.losses["averaged"] - 0.01


def _example() -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module("fsdp2_language_model")


def _training() -> Any:
    example = _example()
    options = argparse.Namespace(**SETTINGS)
    return example.Training(example.Shape(**SHAPE), torch.device("cpu"), options)


def _bits(training: Any) -> dict[str, bytes]:
    """Of this process's shards, the model's and its average's, and of the optimizer's."""
    found = {}
    for part in ("model", "averaged", "optimizer"):
        for name, value in training.state()[part].items():
            tensors = value if part == "optimizer" and name == "state" else {name: value}
            for inner, entry in tensors.items():
                for key, tensor in (entry if isinstance(entry, dict) else {"": entry}).items():
                    if isinstance(tensor, torch.Tensor):
                        shard = getattr(tensor, "_local_tensor", tensor)
                        found[f"{part}.{inner}.{key}"] = shard.detach().numpy().tobytes()
    return found


def _in_one_go_and_resumed(folder: Path) -> list[tuple[int, dict[str, bytes], dict[str, float]]]:
    whole = _training()
    whole.train(6, folder / "whole")
    half = _training()
    half.train(3, folder / "half")
    half.losses()  # swaps averages in, and out again
    half.train(4, folder / "half")
    resumed = _training()
    resumed.resume(folder / "half")
    assert resumed.steps == 4
    assert int(resumed.averaged.steps) == 4
    resumed.train(6, folder / "half")
    return [(run.steps, _bits(run), run.losses()) for run in (whole, resumed)]


def _text_of_three_steps() -> list[str]:
    training = _training()
    seen = []
    for step in range(3):
        training.steps = step
        seen.append(str(training.windows().tolist()))
    return seen


def test_each_step_of_each_process_trains_on_other_text(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_text_of_three_steps)
    assert len({*first, *second}) == 6


def test_a_resumed_training_ends_with_the_same_bits(two_ranks: Ranks, tmp_path: Path) -> None:
    for whole, resumed in two_ranks.run(_in_one_go_and_resumed, tmp_path):
        assert whole == resumed
        names = {name.split(".")[0] for name in whole[1]}
        assert names == {"model", "averaged", "optimizer"}
        assert whole[2]["raw"] != whole[2]["averaged"]


def test_the_text_is_pythons_reference_in_two_parts() -> None:
    training, held_out = _example().load_text()
    text = bytes(torch.cat([training, held_out]).tolist()).decode()
    assert len(held_out) == 8 * 1024
    assert len(training) > 300_000
    topics = importlib.import_module("pydoc_data.topics").topics
    assert all(topic in text for topic in topics.values())
    assert len(topics) > 60


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "start a training by torchrun"),
        (["--steps", "0"], "argument --steps: 0 is less than 1"),
        (["--evaluate", "x", "--width", "10", "--heads", "4"], "--width 10 is no multiple"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["fsdp2_language_model.py", *arguments])
    with pytest.raises(SystemExit):
        _example().main()
    assert says in capsys.readouterr().err
