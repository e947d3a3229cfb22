"""Compiled updates, DTensors and training steps: each is checked. No test looks at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import __main__ as program
from benchmarks import compiled, pages, sharded, step
from ema_fused.bench import timing
from ema_fused.bench.contenders import FLOAT32, MIXED, Group
from ema_fused.bench.measuring import Case, Run
from ema_fused.bench.shapes import Shapes, find
from ema_fused.bench.tables import tables
from ema_fused.bench.timing import NO_EFFORT, CpuClock

SHAPES = Shapes("some", "some", [(5, 3), (), (4,)], "made up")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a small network."""
    monkeypatch.setattr(step, "_BLOCKS", 2)
    monkeypatch.setattr(step, "_WIDTH", 8)


@pytest.fixture
def quick(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are traced, but nothing is compiled."""

    def traced(function: Callable[..., Any], **options: Any) -> Any:
        return torch.compile(function, dynamic=False, backend="eager", **options)

    monkeypatch.setattr(compiled, "compiled", traced)
    monkeypatch.setattr(step, "compiled", traced)


def measured(cases: Iterator[Case]) -> dict[str, Any]:
    run = Run(CpuClock(), NO_EFFORT, {})
    list(run.measure(cases))
    return run.report


def off(call: Callable[[], object], tensor: torch.Tensor) -> Callable[[], object]:
    def wrong() -> None:
        call()
        tensor.view(-1)[0] += 0.1

    return wrong


def each_is_noticed(group: Group) -> None:
    """The group's check fails whichever contender is wrong."""
    for contender in group.contenders:
        right = contender.calls[0]
        contender.calls[0] = off(right, contender.buffers[0].averaged[0])
        with pytest.raises(AssertionError, match="differs from torch at tensor 0"):
            group.check()
        contender.calls[0] = right


# ---- Compiled ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_compiled_updates_are_measured_and_each_is_checked() -> None:
    cases = list(compiled.compiled_cases([SHAPES], [FLOAT32, MIXED], CpuClock()))
    report = measured(iter(cases))
    assert report["failed"] == report["left_out"] == []
    names = [[c["name"] for c in entry["contenders"]] for entry in report["cases"]]
    ours, foreach = "ema_fused Plan.lerp_", "torch._foreach_lerp_"
    assert names == [
        [ours, foreach, f"torch.compile of {foreach}"],
        [ours, "torch.compile of lerp_ of float()"],
    ]
    assert {entry["condition"] for entry in report["cases"]} == {"cold"}
    for case in cases:
        with torch.no_grad():
            group = case.make()
            each_is_noticed(group)
            group.check()


def test_a_row_of_readme_is_there_where_a_model_has_it() -> None:
    name = "torch.compile of torch._foreach_lerp_"
    found = {
        **{"kind": "compiled", "model": "resnet50", "dtypes": "float32", "title": "torch.compile"},
        **{"model_title": "ResNet-50", "contenders": [{"name": name, "ratio": 1.25}]},
    }
    report = pages.records.read(pages.MEASURED)
    row = "| `torch.compile` of foreach, float32 lists |"
    report["cases"] = [case for case in report["cases"] if case["kind"] != "compiled"]
    assert row not in pages.readme_part(report)
    report["cases"].append(found)
    assert f"{row} 1.2 |  |  |  |" in pages.readme_part(report)


@pytest.mark.usefixtures("small")
def test_what_cannot_be_compiled_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **options: Any) -> Any:
        def call(*arguments: Any) -> None:
            raise RuntimeError("no compiler\nand more")

        return call

    monkeypatch.setattr(compiled, "compiled", broken)
    monkeypatch.setattr(step, "compiled", broken)
    lists = [SHAPES, find("201x1")]
    report = measured(iter([*compiled.compiled_cases(lists, [FLOAT32], CpuClock())]))
    failed = "torch.compile failed: RuntimeError: no compiler"
    assert [left["reason"] for left in report["left_out"]] == [
        failed,
        "more than 200 tensors take too long to compile",
    ]
    report = measured(step.step_cases())
    assert [entry["title"] for entry in report["cases"]] == ["a training step, eager"]
    assert [left["reason"] for left in report["left_out"]] == [failed]


# ---- DTensors ------------------------------------------------------------------------------------


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


@needs_gloo
def test_ways_of_sharded_trainers_are_measured_and_the_group_is_gone() -> None:
    report = measured(sharded.sharded_cases([SHAPES], CpuClock()))
    assert report["failed"] == report["left_out"] == []
    assert not dist.is_initialized()
    (entry,) = report["cases"]
    names = [contender["name"] for contender in entry["contenders"]]
    assert names[:2] == ["ema_fused Plan of the shards", "ema_fused.lerp_ of DTensors"]
    for source in ("torchtitan", "DINOv3", "cosmos-predict2", "NeMo Automodel", "FastVideo"):
        assert any(name.endswith(f"({source})") for name in names[2:])
    cold, hot, *_ = tables(report)
    assert [row[0] for row in cold.rows] == [row[0] for row in hot.rows] == names


@needs_gloo
def test_every_way_of_sharded_trainers_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = sharded.sharded_cases([SHAPES], CpuClock())
    with torch.no_grad():
        group = case.make()
        try:
            group.check()
            each_is_noticed(group)
        finally:
            group.close()
    monkeypatch.setattr(sharded, "loop", lambda averaged, source: None)
    (failed,) = measured(sharded.sharded_cases([SHAPES], CpuClock()))["failed"]
    assert "NeMo Automodel" in failed["reason"]
    assert not dist.is_initialized()


def test_without_torch_distributed_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    report = measured(sharded.sharded_cases([SHAPES], CpuClock()))
    (left,) = report["left_out"]
    assert left["reason"] == "torch.distributed with gloo isn't there"
    assert report["cases"] == report["failed"] == []


# ---- Steps ---------------------------------------------------------------------------------------


def test_the_network_has_a_hundred_parameters_always_the_same() -> None:
    one, other = (list(step.network().parameters()) for _ in range(2))
    assert len(one) == 100
    assert all(map(torch.equal, one, other))


@pytest.mark.usefixtures("quick")
def test_steps_are_measured_with_and_without_an_average() -> None:
    report = measured(step.step_cases())
    assert report["failed"] == report["left_out"] == []
    eager, whole = report["cases"]
    assert [c["name"] for c in eager["contenders"]] == [
        step.WITHOUT,
        step.OURS,
        step.ATTACHED,
        step.TORCH,
    ]
    assert [c["name"] for c in whole["contenders"]] == [
        step.WITHOUT,
        step.WITHOUT_APART,
        step.OURS,
        step.ATTACHED,
        step.TORCH,
    ]
    for entry in (eager, whole):
        assert entry["condition"] == "step"
        for contender in entry["contenders"]:
            alone = contender["name"] in (step.WITHOUT, step.WITHOUT_APART)
            assert ("added" in contender) == ("added_fraction" in contender) == (not alone)
            assert contender["timing"]["rounds"] >= 9
    (table,) = step.table(report)
    assert table.heads[1:] == ["a training step, eager", "a training step, under torch.compile"]
    assert [row[0] for row in table.rows if row[1].startswith("a step: ")] == [step.WITHOUT]
    assert step.table({"cases": []}) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mode", [step.EAGER, step.COMPILED])
def test_every_step_is_checked(mode: str) -> None:
    torch.compiler.reset()
    networks = step.trained(mode)
    assert len(networks) == (4 if mode == step.EAGER else 5)
    step.check(networks)
    for place, one in enumerate(networks):
        what = (one.averages or one.parameters)[0]
        others = networks[place + 1 :]
        wanted = f"the average of {one.name} differs" if one.averages else "trained beside"
        if place == 0:  # the others are compared with it: its own tensors are right by definition
            wanted = f"trained beside {others[0].name}"
        with pytest.raises(AssertionError, match=wanted):
            step.check([*networks[:place], replace(one, step=off(one.step, what)), *others])
        # All are alike again for the next one: compiling them anew would take many seconds.
        what.view(-1)[0] -= 0.1
        for rest in others[1:] if place == 0 else others:
            rest.step()
    step.check(networks)


def test_differences_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"no average": [1.0, 2.0, 3.0] * 3, "with": [1.5, 2.5, 3.5] * 3}
    monkeypatch.setattr(timing, "one_call", lambda name: seconds[name].pop())
    group: Any = step.StepGroup(
        [SimpleNamespace(name=name, calls=[name]) for name in seconds],  # type: ignore[misc]
        *(0, lambda: None),
        without={"no average": None, "with": "no average"},
    )
    found = step.measure(CpuClock(), group, replace(NO_EFFORT, rounds=1))
    added = found["contenders"][1]["added"]
    assert added["lower_quartile"] == added["median"] == added["upper_quartile"] == 0.5
    assert found["contenders"][1]["added_fraction"] == 0.25


# ---- On the command line -------------------------------------------------------------------------


def test_what_is_measured_by_default_and_by_name() -> None:
    every = program.options([])
    assert {"compiled", "sharded", "step", "busy"} < set(every.peers)
    assert not every.named_models
    cases = _cases("--peers", "compiled", "sharded", "busy", "step")
    assert [(case.kind, case.shapes.key) for case in cases] == [
        *(("compiled", key) for key in ("100x1024", "resnet50") for _ in range(2)),
        *(("sharded", key) for key in ("100x1024", "resnet50")),
        *(("step", "step") for _ in range(2)),
        *(("busy", key) for key in ("100x1024", "600x96", "1000x1024", "161x160000")),
    ]
    named = _cases("--peers", "compiled", "busy", "--models", "3x2", "--dtypes", "float32")
    assert [(case.kind, case.shapes.key) for case in named] == [
        ("compiled", "3x2"),
        ("busy", "3x2"),
    ]


def _cases(*arguments: str) -> list[Case]:
    chosen = program.options(arguments)
    clock = CpuClock()
    return list(program._cases(chosen, clock, Run(clock, NO_EFFORT, {})))


def test_on_a_gpu_they_are_left_out_by_name() -> None:
    chosen = program.options(["--device", "cuda", "--peers", "busy", "step"])
    run = Run(CpuClock(), NO_EFFORT, {})
    clock: Any = SimpleNamespace(device=torch.device("cuda"), cache_bytes=0)
    assert list(program._cases(chosen, clock, run)) == []
    (left,) = run.report["left_out"]
    assert left == {"case": "step, busy", "reason": "measured on the CPU only"}
