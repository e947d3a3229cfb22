"""The benchmark of the adapters measures what it says. No test here looks at how long it took."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WRAPPERS = [
    "torch AveragedModel, EMA",
    "torch AveragedModel, mean",
    "torch get_ema_multi_avg_fn on lists",
    "timm ModelEmaV3",
    "timm ModelEmaV2",
    "diffusers EMAModel",
    "diffusers EMAModel, foreach",
    "ema-pytorch EMA",
    "torch-ema",
]
SETS = ["quick-resnet50", "quick-1000x1024", "quick-gpt2-small"]


def test_quick_run_measures_every_wrapper_on_all_sets_of_shapes(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "adapter_speed.py"), "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(report)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    found = [(row["shapes"], row["group"], row["contender"]) for row in results]
    sides = ("ema_fused", "original")
    assert found == [(s, w, side) for s in SETS for w in WRAPPERS for side in sides]
    for ours, original in zip(results[::2], results[1::2], strict=True):
        assert ours["ratio"] == 1.0
        assert original["ratio"] > 0
        assert ours["timing"]["median"] > 0
    for name in WRAPPERS:
        assert f"| {name} |" in done.stdout


@pytest.mark.parametrize("place", range(len(WRAPPERS)), ids=WRAPPERS)
def test_a_wrong_result_stops_the_benchmark(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    adapter_speed: Any = importlib.import_module("adapter_speed")
    values = [torch.randn(4, 3), torch.randn(5)]
    wrapped = list(adapter_speed.wrappers(values))[place]
    assert wrapped.name == WRAPPERS[place]
    adapter_speed.check(wrapped, seed=1)
    with torch.no_grad():
        wrapped.ours.averages()[1][2] += 0.01
    with pytest.raises(AssertionError, match=f"{wrapped.name}: tensor 1 of shape"):
        adapter_speed.check(wrapped, seed=2)


def test_the_shapes_of_gpt2_small_are_those_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(BENCHMARKS)
    shapes: Any = importlib.import_module("shapes")
    transformers: Any = importlib.import_module("transformers")
    with torch.device("meta"):
        model = transformers.GPT2Model(transformers.GPT2Config())
    assert shapes.gpt2_small() == [tuple(p.shape) for p in model.parameters()]
