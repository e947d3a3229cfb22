"""The benchmark program goes the whole way on tiny tensors. No test here looks at a time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import peers
from ema_fused.bench import environment
from ema_fused.bench.timing import CpuClock
from tests import processes

PEERS = {
    "mmengine": 4,
    "mmdet": 2,
    "mmdet_2": 2,
    "mmpretrain": 1,
    "mmcv": 1,
    "mmselfsup": 1,
    "swa_utils": 3,
    "timm": 2,
    "diffusers": 2,
    "ema_pytorch": 1,
    "torch_ema": 1,
}
REASON = "compiling takes too long for a smoke run"
CONDITIONS = {"growth": "hot", "busy": "busy", "step": "step"}  # of all others: cold


def measured(*arguments: str) -> dict[str, Any]:
    """The report of a smoke run in this process."""
    chosen = program.options(["--smoke", *arguments])
    run = program.run_of(chosen, CpuClock())
    for _ in program.measure(run, chosen):
        pass
    return run.report


# ---- The whole way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A smoke run of everything, and what it wrote."""
    for package in ("mmengine", "mmcv", "diffusers", "ema_pytorch", "torch_ema"):
        pytest.importorskip(package, reason=f"{package} is measured")
    folder = tmp_path_factory.mktemp("whole")
    done = processes.run(
        *("-m", "benchmarks", "--smoke", "--threads", 1, "--json", folder / "run.json"),
        *("--markdown", folder / "run.md", "--pictures", folder / "pictures"),
    )
    return SimpleNamespace(
        stdout=done.stdout,
        stderr=done.stderr,
        report=json.loads((folder / "run.json").read_text(encoding="utf-8")),
        markdown=(folder / "run.md").read_text(encoding="utf-8"),
        pictures=sorted(path.name for path in (folder / "pictures").iterdir()),
    )


def test_every_case_is_there(whole: SimpleNamespace) -> None:
    report = whole.report
    assert report["failed"] == []
    left_out = [("compiled", REASON), ("a training step, under torch.compile", REASON)]
    assert [(left["case"], left["reason"]) for left in report["left_out"]] == left_out
    keys = [(c["kind"], c["model"], c["dtypes"]) for c in report["cases"] if c["peer"] == "torch"]
    lists = [("lists", dtypes) for dtypes in ("float32", "bfloat16 into float32", "bfloat16")]
    others = [("several", "float32"), ("models", "float32"), ("models", "bfloat16")]
    assert keys == [
        *(("host", model, "float32") for model in ("161x16", "20x16")),
        *((k, model, d) for model in ("resnet50", "20x16") for k, d in (*lists, *others)),
        ("step", "step", "float32"),
        ("busy", "20x16", "float32"),
        *(
            ("growth", f"{count}x{total // count}", "float32")
            for total in (1_000, 10_000, 100_000)
            for count in (10, 100)
        ),
    ]
    found = [c["peer"] for c in report["cases"] if c["kind"] == "peer"]
    assert found == [peer for peer, count in PEERS.items() for _ in range(2 * count)]
    assert [c["model"] for c in report["cases"] if c["kind"] == "sharded"] == ["20x16"]


def test_ratios_and_fractions_are_those_of_the_timings(whole: SimpleNamespace) -> None:
    close = {"rel": 3.1e-5}  # each of three numbers is written to 1e-5 of itself
    for case in whole.report["cases"]:
        ours = case["contenders"][0]
        first = "no average" if case["kind"] == "step" else "ema_fused"
        assert first in ours["name"] and ours["ratio"] == 1.0
        assert set(case["launches"]) <= {1}
        assert case["condition"] == CONDITIONS.get(case["kind"], "cold")
        for contender in case["contenders"]:
            timing = contender["timing"]
            assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
            assert timing["rounds"] >= (5 if case["condition"] == "hot" else 9)
            assert ("hot_timing" in contender) == (case["condition"] == "cold")
            if case["condition"] == "cold":
                assert timing["calls_per_round"] == 1
                ratio = contender["hot_timing"]["median"] / ours["hot_timing"]["median"]
                assert contender["hot_ratio"] == pytest.approx(ratio, **close)
            ratio = timing["median"] / ours["timing"]["median"]
            assert contender["ratio"] == pytest.approx(ratio, **close)
            if case["kind"] in ("host", "busy", "step"):
                assert case["limit"] is contender["limit_fraction"] is None
            else:
                fraction = case["limit"]["median"] / timing["median"]
                assert contender["limit_fraction"] == pytest.approx(fraction, **close)


def test_bytes_are_counted_by_dtypes_and_averages(whole: SimpleNamespace) -> None:
    floors = {"float32": 12, "bfloat16 into float32": 10, "bfloat16": 6}
    for case in whole.report["cases"]:
        a_parameter = floors[case["dtypes"]]
        if case["kind"] == "several":
            a_parameter = 4 * 8 + 4
        if case["title"].endswith("swap in and out"):
            a_parameter = 32
        assert case["bytes_moved"] == a_parameter * case["elements"]


def test_tables_pictures_and_progress_are_of_that_run(whole: SimpleNamespace) -> None:
    about = whole.report["environment"]
    assert about["torch"] == torch.__version__ and about["threads"] == 1
    assert about["command"].startswith("python -m benchmarks --smoke --threads 1 --json")
    assert about["command"] in whole.markdown
    assert whole.markdown in whole.stdout
    foreach = next(
        contender["ratio"]
        for case in whole.report["cases"]
        if case["kind"] == "lists"
        for contender in case["contenders"]
        if contender["name"] == "torch._foreach_lerp_"
    )
    assert f"| torch._foreach_lerp_ | {foreach:.2f} (" in whole.markdown
    title = "prepared lists, float32, {} caches**"
    cold, hot = (whole.markdown.index(title.format(how)) for how in ("cold", "warm"))
    assert cold < hot
    for title in ("All cores taken", "What an average adds to a training step"):
        assert f"**{title}" in whole.markdown
    for case in whole.report["cases"]:
        if case["kind"] == "peer":
            assert f"| {case['title']} | " in whole.markdown
    names = ("growth", "limit", "ratios")
    assert whole.pictures == [
        f"{name}-{theme}.svg" for name in names for theme in ("dark", "light")
    ]
    total = len(whole.report["cases"])
    assert f"[{total}/{total}] 100 x 1 000, float32" in whole.stderr


# ---- What is left out, and what goes wrong -------------------------------------------------------


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'timm'"), OSError("gone")])
def test_a_peer_that_is_not_installed_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def missing(peer: str) -> list[Any]:
        raise error

    monkeypatch.setattr(peers, "matches", missing)
    report = measured("--models", "3x2", "--peers", "timm", "torch", "--dtypes", "float32")
    reason = f"it isn't installed: {error}"
    assert report["left_out"] == [{"case": "timm", "reason": reason}]
    assert {case["peer"] for case in report["cases"]} == {"torch"}


def test_peers_without_their_dtype_are_left_out_by_name() -> None:
    report = measured("--models", "3x2", "--peers", "timm", "torch", "--dtypes", "bfloat16")
    (left,) = report["left_out"]
    assert left["case"] == "timm" and "measured in float32" in left["reason"]


def test_a_run_that_measures_nothing_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "growth", None)
    file = tmp_path / "run.json"
    assert program.main(["--smoke", "--peers", "growth", "--json", str(file)]) == 0
    (left,) = json.loads(file.read_text(encoding="utf-8"))["left_out"]
    assert left["case"] == "growth" and "scipy" in left["reason"]
    assert "| growth | the fit needs scipy" in capsys.readouterr().out


def test_a_failed_case_is_written_and_the_others_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(peer: str, shapes: Any, clock: Any) -> Any:
        raise RuntimeError("not so\nsecond line")

    case = SimpleNamespace(
        name="broken", kind="peer", bytes_needed=0, make=lambda: broken("", 0, 0)
    )
    monkeypatch.setattr(peers, "peer_cases", lambda *arguments: iter([case]))
    file = tmp_path / "run.json"
    arguments = ["--smoke", "--models", "3x2", "--peers", "timm", "torch", "--dtypes", "float32"]
    assert program.main([*arguments, "--json", str(file)]) == 1
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["failed"] == [{"case": "broken", "reason": "RuntimeError: not so"}]
    assert len(report["cases"]) > 3
    assert "| broken | RuntimeError: not so |" in capsys.readouterr().out


def test_what_does_not_fit_the_memory_or_the_time_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CpuClock, "free_bytes", lambda self: 10)
    report = measured("--models", "1000x1000", "--peers", "torch", "--dtypes", "bfloat16")
    assert any("may need" in entry["reason"] for entry in report["left_out"])
    late = measured("--models", "3x2", "--peers", "torch", "--seconds", "-1")
    assert {entry["reason"] for entry in late["failed"]} == {"no time was left"}
    assert late["cases"] == []


@pytest.mark.parametrize("key", ["resnet51", "resnet50*x", "1000x"])
def test_unknown_shapes_are_refused_before_anything_runs(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.options(["--models", key])
    message = capsys.readouterr().err
    assert repr(key) in message and "known are gpt2_small, llama_3_8b" in message


def test_without_a_gpu_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "why_no_gpu", lambda: "torch sees no CUDA device")
    assert program.main(["--device", "cuda", "--json", str(tmp_path / "gpu.json")]) == 77
    assert "nothing was measured and nothing is written: torch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_is_given_lists_far_larger_than_its_cache() -> None:
    chosen = program.options(["--device", "cuda"])
    shapes = [program.find(key) for key in chosen.models]
    assert sum(4 * s.elements >= 10**9 for s in shapes) == 4
    assert chosen.peers[0] == "torch"
    assert max(16 * s.elements for s in shapes) < 0.9 * 139 * 2**30
    assert math.isinf(chosen.seconds)


def test_the_command_is_told_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench.py", "--json", "a b"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    assert environment.command() == "python /somewhere/bench.py --json 'a b'"
    spec = SimpleNamespace(name="benchmarks.__main__")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    assert environment.command() == "python -m benchmarks --json 'a b'"
