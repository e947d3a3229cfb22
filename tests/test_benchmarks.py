"""The benchmarks measure what they say. No test here looks at how long anything took."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder by name, as its scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_resnet50_has_the_shapes_of_the_real_network(benchmark_module: Any) -> None:
    shapes = benchmark_module("shapes")
    found = shapes.resnet50()
    assert len(found) == 161
    assert shapes.total_elements(found) == 25_557_032
    convolutions = [shape for shape in found if len(shape) == 4]
    assert len(convolutions) == 53
    assert convolutions[0] == (64, 3, 7, 7)
    assert sum(shape[2:] == (3, 3) for shape in convolutions) == 16
    assert convolutions[-1] == (2048, 512, 1, 1)
    assert found[-2:] == [(1000, 2048), (1000,)]
    # Each convolution is followed by the weight and bias of the batch norm over its outputs.
    for i, shape in enumerate(found):
        if len(shape) == 4:
            assert found[i + 1] == found[i + 2] == (shape[0],)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("1000x1024", 1000, 1_024_000), ("1000x16", 1000, 16_000), ("large", 8, 160_000_000)],
)
def test_flat_sets_hold_what_their_names_say(
    benchmark_module: Any, name: str, tensors: int, elements: int
) -> None:
    shapes = benchmark_module("shapes")
    found = shapes.SHAPE_SETS[name]()
    assert len(found) == tensors
    assert sum(math.prod(shape) for shape in found) == elements


def test_contenders_take_turns_and_all_are_counted(benchmark_module: Any) -> None:
    timing = benchmark_module("timing")
    calls: list[str] = []
    contenders = {"first": lambda: calls.append("a"), "second": lambda: calls.append("b")}
    timings = timing.time_in_turns(contenders, rounds=4, sample_seconds=0.0)
    assert list(timings) == ["first", "second"]
    for found in timings.values():
        assert found.rounds == 4
        assert found.calls_per_round == 1
        assert 0 < found.lower_quartile <= found.median <= found.upper_quartile
    # The four rounds are the end of the record: a warming and a timed call each, order rotating.
    assert "".join(calls[-16:]) == "aabb" + "bbaa" + "aabb" + "bbaa"
    with pytest.raises(ValueError, match="rounds is 1"):
        timing.time_in_turns(contenders, rounds=1)


def test_the_check_before_timing_finds_a_wrong_result(benchmark_module: Any) -> None:
    contenders = benchmark_module("contenders")
    source = [torch.ones(5), torch.ones(3)]
    group = contenders.list_group(source)
    contenders.check(group, seed=0)
    averaged = group.contenders[0].averaged
    update = functools.partial(torch._foreach_lerp_, averaged, source, 0.0010001)
    almost = contenders.Contender("almost", update, averaged)
    with pytest.raises(AssertionError, match="almost differs from torch at tensor 0"):
        contenders.check(contenders.Group("lists", source, [almost]), seed=0)


def test_smoke_run_prints_tables_and_writes_json(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "update_speed.py"), "--smoke"]
    done = subprocess.run(
        [*command, "--threads", "1", "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text(encoding="utf-8"))

    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["threads"] == 1
    found = {(row["shapes"], row["group"], row["contender"]): row for row in written["results"]}
    assert len(found) == len(written["results"])
    assert {key[:2] for key in found} == {
        (shapes, group)
        for shapes in ("smoke-mixed", "smoke-20x16")
        for group in ("lists", "mixed", "several", "models")
    }
    for (shapes, group, contender), row in found.items():
        timing = row["timing"]
        assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
        ours = {"models": "ExponentialMovingAverage", "several": "Plan of 4 averages"}
        reference = found[shapes, group, f"ema_fused {ours.get(group, 'Plan.lerp_')}"]["timing"]
        assert row["ratio"] == pytest.approx(timing["median"] / reference["median"])
        row_of_table = next(
            line for line in done.stdout.splitlines() if line.startswith(f"| {contender} |")
        )
        assert row_of_table.count("|") == 4, "one cell for each of the two sets of shapes"
        assert f"**{row['ratio']:.2f}**" in done.stdout
