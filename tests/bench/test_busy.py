"""The busy machine: processes spin, and are gone afterwards. No test here looks at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ema_fused.bench import busy, short, timing
from ema_fused.bench.busy import spinning
from ema_fused.bench.cases import BUSY_LISTS, busy_cases
from ema_fused.bench.measuring import Run
from ema_fused.bench.shapes import find
from ema_fused.bench.tables import tables
from ema_fused.bench.timing import NO_EFFORT, CpuClock
from tests import processes

INTERRUPTED = """
import time
from ema_fused.bench.busy import spinning
with spinning(2) as started:
    print(*(process.pid for process in started), flush=True)
    time.sleep(600)
"""


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """All processes that are started."""
    found: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            found.append(self)

    monkeypatch.setattr(busy.subprocess, "Popen", Recorded)
    return found


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_processes_are_gone_when_the_block_raises(error: type[BaseException]) -> None:
    with pytest.raises(error), spinning(2) as processes_of_it:
        assert [process.poll() for process in processes_of_it] == [None, None]
        raise error
    assert all(is_gone(process.pid) for process in processes_of_it)


def test_processes_are_gone_when_a_call_raises(
    monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    def broken(call: object) -> float:
        assert all(process.poll() is None for process in started)
        raise RuntimeError("broken")

    monkeypatch.setattr(timing, "one_call", broken)
    run = Run(CpuClock(), NO_EFFORT, {})
    list(run.measure(busy_cases([find("3x2")], run.clock)))
    assert [failed["reason"] for failed in run.report["failed"]] == ["RuntimeError: broken"]
    assert len(started) == busy.cores()
    assert all(is_gone(process.pid) for process in started)


def test_processes_are_gone_when_one_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    recorded = busy.subprocess.Popen

    def popen(*arguments: object, **options: object) -> object:
        if started:
            raise OSError("no more processes")
        return recorded(*arguments, **options)

    monkeypatch.setattr(busy.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no more"), spinning(2):
        pass
    assert len(started) == 1 and is_gone(started[0].pid)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_their_parent(number: signal.Signals) -> None:
    parent = processes.start("-c", INTERRUPTED)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and not any(map(is_gone, pids))
    parent.send_signal(number)
    parent.wait()
    parent.communicate()
    end = time.monotonic() + 60
    while not all(map(_has_ended, pids)):
        assert time.monotonic() < end, "they spin on without their parent"


def _has_ended(pid: int) -> bool:
    """Gone, or ended and not yet waited for by whoever inherited it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return is_gone(pid)
    return state == "Z"


def test_the_table_has_ours_over_foreach() -> None:
    run = Run(CpuClock(), NO_EFFORT, {})
    list(run.measure(busy_cases([find("3x2")], run.clock)))
    (entry,) = run.report["cases"]
    ours, foreach = entry["contenders"]
    assert (entry["condition"], entry["spinning"]) == ("busy", busy.cores())
    assert foreach["name"] == "torch._foreach_lerp_"
    assert ours["timing"]["rounds"] == foreach["timing"]["rounds"] >= NO_EFFORT.busy_rounds
    wanted = {
        "mean": ours["mean"] / foreach["mean"],
        "median": ours["timing"]["median"] / foreach["timing"]["median"],
        "percentile_99": ours["percentile_99"] / foreach["percentile_99"],
    }
    assert entry["ours_over_foreach"] == pytest.approx(wanted)
    for contender in (ours, foreach):
        assert contender["percentile_99"] >= contender["timing"]["upper_quartile"]
    (table,) = tables(run.report)
    assert table.heads == ["", "mean", "median", "99th percentile"]
    assert table.rows[0][0] == "3 x 2" and len(table.rows[0]) == 4


def test_the_short_benchmark_measures_it_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(short, "BUSY_LISTS", ("3x2", "2x5"))
    assert short.bench(effort=NO_EFFORT, busy=True) == 0
    printed = capsys.readouterr().out
    assert "| 3 x 2 | " in printed and "| 2 x 5 | " in printed and "caches" not in printed
    for wrong in ({"device": "cuda"}, {"model": "a:b"}):
        with pytest.raises(ValueError, match="a busy machine is measured on the CPU"):
            short.bench(**wrong, busy=True)  # type: ignore[arg-type]
    assert BUSY_LISTS == ("100x1024", "600x96", "1000x1024", "161x160000")
