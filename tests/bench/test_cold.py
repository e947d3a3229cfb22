"""Cold caches: what is touched between two samples. No test here looks at a time."""

from __future__ import annotations

from functools import partial

import pytest

from ema_fused.bench import measuring
from ema_fused.bench.cases import host_cases, torch_cases
from ema_fused.bench.measuring import Run
from ema_fused.bench.shapes import find
from ema_fused.bench.tables import tables
from ema_fused.bench.timing import NO_EFFORT, CpuClock, Effort, time_cold, time_host
from ema_fused.bench.touching import Touching


def test_as_much_is_touched_as_is_said() -> None:
    usual = Effort()
    assert (usual.cold_bytes, usual.cold_objects) == (256 * 2**20, 100_000)
    touching = Touching(NO_EFFORT)
    assert (touching.bytes, touching.objects) == (NO_EFFORT.cold_bytes, NO_EFFORT.cold_objects)
    texts = [text for (text,) in touching._lists]
    assert len({id(text) for text in texts}) == len(texts) == touching.objects / 2
    for times in (1.0, 2.0):
        assert touching() == sum(map(len, texts))
        assert bool((touching._flat == times).all())


def test_a_sample_is_one_call_right_after_memory_was_touched() -> None:
    done: list[str] = []
    calls = {name: partial(done.append, name) for name in "ab"}
    timings = time_cold(calls, NO_EFFORT, partial(done.append, "-"))
    assert [(t.rounds, t.calls_per_round) for t in timings.values()] == [(9, 1), (9, 1)]
    assert "".join(done) == "ab" + ("-a-b" + "-b-a") * 4 + "-a-b"


def test_rounds_end_with_the_time_but_not_before_nine() -> None:
    for seconds, rounds in ((60.0, 12), (0.0, 9)):
        effort = Effort(rounds=12, case_seconds=seconds)
        assert time_cold({"a": lambda: None}, effort, lambda: None)["a"].rounds == rounds


def test_the_host_is_touched_while_the_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    clock = CpuClock()

    def occupy(seconds: float) -> object:
        done.append("busy")
        return lambda: True

    monkeypatch.setattr(clock, "occupy", occupy)
    call, touch = partial(done.append, "call"), partial(done.append, "touch")
    timings, _ = time_host(clock, {"a": call}, 3, 1, touch)
    assert timings["a"].rounds == 3
    assert done[-9:] == ["busy", "touch", "call"] * 3


def test_every_case_is_measured_hot_and_cold_with_memory_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touched: list[int] = []

    class Counting(Touching):
        def __call__(self) -> int:
            touched.append(1)
            return super().__call__()

    monkeypatch.setattr(measuring, "Touching", Counting)
    run = Run(CpuClock(), NO_EFFORT, {})
    cases = [
        *torch_cases(find("3x2"), ("float32",), run.clock),
        *host_cases([find("3x2")], run.clock),
    ]
    for case in run.measure(cases):
        entry = run.report["cases"][-1]
        contenders = entry["contenders"]
        assert (entry["kind"], entry["condition"]) == (case.kind, "cold")
        assert all(c["timing"]["rounds"] == 9 for c in contenders)
        # Beside the contenders their limit takes its turn; the host's has a call on trial.
        assert len(touched) == (10 if case.kind == "host" else 9) * len(contenders) + 9 * (
            case.kind != "host"
        )
        touched.clear()


def test_tables_of_cold_caches_come_first_and_say_what_is_touched() -> None:
    run = Run(CpuClock(), NO_EFFORT, {})
    for _ in run.measure(torch_cases(find("3x2"), ("float32",), run.clock)):
        pass
    found = tables(run.report)
    titles = [table.title for table in found]
    for cold, hot in zip(found[:-1:2], found[1:-1:2], strict=True):
        name = cold.title.removesuffix(", cold caches")
        assert (cold.title, hot.title) == (f"{name}, cold caches", f"{name}, warm caches")
        assert "0.0625 MiB of memory and 100 small Python objects are touched" in cold.note
        assert "touched" not in hot.note
    assert len(titles) == 7 and titles[-1].endswith("reaches, cold caches")
    lists = next(case for case in run.report["cases"] if case["kind"] == "lists")
    foreach = next(c for c in lists["contenders"] if c["name"] == "torch._foreach_lerp_")
    for table, ratio in zip(found, (foreach["ratio"], foreach["hot_ratio"]), strict=False):
        (cells,) = (row[1:] for row in table.rows if row[0] == foreach["name"])
        assert cells[0].startswith(f"{ratio:.2f} (")
