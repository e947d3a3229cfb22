"""Averages updated by a thread: what waits for what, failures, the thread's life."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ema_fused import SlowPathWarning
from ema_fused.offloading.offloaded_plan import OffloadedPlan
from ema_fused.offloading.staging import Piece
from tests import processes

SECONDS = 20.0  # no test waits as long unless something hangs


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ema_fused offload"]


class Gate:
    """Holds a method of the pieces, from its call number ``first`` on, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, first: int = 0) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._calls = 0
        original = getattr(Piece, method)

        def held(piece: Piece, *arguments: Any, **keywords: Any) -> None:
            self._calls += 1
            if self._calls > first:
                self.reached.set()
                assert self._open.wait(SECONDS)
            original(piece, *arguments, **keywords)

        monkeypatch.setattr(Piece, method, held)

    def open(self) -> None:
        self._open.set()


class Started(threading.Thread):
    """A call that is expected to wait."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def is_waiting(self) -> bool:
        self.join(0.2)
        return self.is_alive()

    def result(self) -> None:
        self.join(SECONDS)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


# ---- Order and waiting ---------------------------------------------------------------------------


def test_a_call_returns_at_once_and_sources_are_free_when_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = OffloadedPlan(
        [torch.zeros(300) for _ in range(10)],
        [torch.full((300,), float(i)) for i in range(10)],
        staging_bytes=1200,
    )
    staging, averaging = Gate(monkeypatch, "stage", 4), Gate(monkeypatch, "average", 9)
    plan.lerp_(0.5)  # returns, though the gates are closed
    assert staging.reached.wait(SECONDS)

    def overwrite() -> None:
        with pytest.warns(SlowPathWarning, match="still reading them"):
            plan.wait_until_read()
        for tensor in plan.source:
            tensor.fill_(torch.nan)

    writer = Started(overwrite)
    assert writer.is_waiting()  # pieces are left to read
    assert not plan.source[-1].isnan().any()
    staging.open()
    writer.result()  # though the last piece isn't averaged
    assert averaging.reached.wait(SECONDS)
    assert plan.averaged[-1].unique().tolist() == [0.0]
    flushing = Started(plan.flush)
    assert flushing.is_waiting()
    averaging.open()
    flushing.result()
    assert [a.unique().tolist() for a in plan.averaged] == [[i / 2] for i in range(10)]


def test_two_buffers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = OffloadedPlan(
        [torch.zeros(300) for _ in range(5)],
        [torch.ones(300) for _ in range(5)],
        staging_bytes=1200,
    )
    order: list[tuple[str, int]] = []
    stage, average = Piece.stage, Piece.average

    def noted_stage(piece: Piece) -> None:
        order.append(("stage", plan._pieces.index(piece)))
        stage(piece)

    def noted_average(piece: Piece, **given: Any) -> None:
        order.append(("average", plan._pieces.index(piece)))
        average(piece, **given)

    monkeypatch.setattr(Piece, "stage", noted_stage)
    monkeypatch.setattr(Piece, "average", noted_average)
    plan.lerp_(0.5)
    plan.flush()
    for i in range(5):
        # The next is on its way before one is averaged, and the one after it is not.
        at = order.index(("average", i))
        staged = [number for what, number in order[:at] if what == "stage"]
        assert staged == list(range(min(i + 2, 5)))
    assert len({piece._host.data_ptr() for piece in plan._pieces}) == 2


def test_a_slow_update_is_waited_for_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged, source = [torch.zeros(1000)], [torch.ones(1000)]
    plan = OffloadedPlan(averaged, source)
    gate = Gate(monkeypatch, "average")
    plan.lerp_(0.5)
    assert gate.reached.wait(SECONDS)  # of one piece: it is read when it is averaged
    plan.wait_until_read()
    source[0].fill_(2.0)

    def second() -> None:
        with pytest.warns(SlowPathWarning, match=r"every n steps.*fewer elements.*CPU threads"):
            plan.lerp_(0.5)

    caller = Started(second)
    assert caller.is_waiting()
    gate.open()
    caller.result()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            plan.copy_()
            plan.wait_until_read()
            plan.lerp_(0.5)
    plan.flush()
    assert averaged[0].unique().tolist() == [2.0]


def test_no_update_is_dropped_and_none_is_reordered() -> None:
    averaged, source = [torch.zeros(5000)], [torch.zeros(5000)]
    plan = OffloadedPlan(averaged, source, staging_bytes=1024)
    expected = torch.zeros(5000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        for step in range(50):
            source[0].fill_(step)
            plan.lerp_(0.5)
            expected.lerp_(torch.full((5000,), float(step)), 0.5)
            plan.wait_until_read()
        plan.flush()
    assert torch.equal(averaged[0], expected)


def test_a_fast_update_says_nothing() -> None:
    plan = OffloadedPlan([torch.zeros(10)], [torch.ones(10)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            plan.lerp_(0.5)
            plan.flush()
            plan.wait_until_read()


def test_a_flag_stops_the_update() -> None:
    averaged, source = [torch.zeros(5000)], [torch.ones(5000)]
    plan = OffloadedPlan(averaged, source, staging_bytes=1024)
    for value in (1.0, torch.nan, torch.inf):
        plan.lerp_(0.5, found_inf=torch.tensor([value]))
        plan.flush()
    assert not averaged[0].any()
    plan.lerp_(0.5, found_inf=torch.tensor(0.0))
    plan.flush()
    assert averaged[0].unique().tolist() == [0.5]


def test_what_is_replaced_during_an_update_is_read_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = (3000, 40, 40, 40)  # the first is cut, the others are not
    averaged, source = [torch.zeros(n) for n in sizes], [torch.ones(n) for n in sizes]
    plan = OffloadedPlan(averaged, source, staging_bytes=1024)
    gate = Gate(monkeypatch, "stage", 1)
    plan.lerp_(0.5)
    assert gate.reached.wait(SECONDS)
    for tensor in source:
        tensor.data = torch.full_like(tensor, 7.0)
    gate.open()
    plan.flush()
    assert [a.unique().tolist() for a in averaged] == [[0.5]] * 4


# ---- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lerp_", "copy_", "wait_until_read", "flush", "close"])
def test_a_failure_surfaces_once_and_later_updates_work(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = [torch.zeros(300) for _ in range(4)]
    plan = OffloadedPlan(averaged, [torch.ones(300) for _ in range(4)], staging_bytes=1200)
    original = Piece.average

    def failing(piece: Piece, **given: Any) -> None:
        if piece is plan._pieces[2]:
            raise OSError("the disk is on fire")
        original(piece, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Piece, "average", failing)
        plan.lerp_(0.5)
        assert plan._update is not None
        assert plan._update.done.wait(SECONDS)
    call = (lambda: plan.lerp_(0.5)) if method == "lerp_" else getattr(plan, method)
    with pytest.raises(RuntimeError, match=r"disk is on fire.*2 of 4 pieces") as raised:
        call()
    assert isinstance(raised.value.__cause__, OSError)
    assert [a.unique().tolist() for a in averaged] == [[0.5], [0.5], [0.0], [0.0]]
    assert method != "close" or plan._worker is None
    plan.wait_until_read()  # it doesn't surface again
    plan.flush()
    plan.copy_()
    plan.flush()
    assert [a.unique().tolist() for a in averaged] == [[1.0]] * 4


# ---- The thread's life ---------------------------------------------------------------------------


def test_nothing_to_do_is_nothing() -> None:
    for plan in (OffloadedPlan([], []), OffloadedPlan([torch.zeros(0)], [torch.zeros(0)])):
        before = len(threads())
        plan.lerp_(0.5)
        plan.copy_()
        plan.wait_until_read()
        plan.flush()
        plan.close()
        assert len(threads()) == before
        assert plan.staged_bytes == 0


def test_one_thread_a_plan_from_its_first_update_on() -> None:
    before = threads()
    plan = OffloadedPlan([torch.zeros(100)], [torch.ones(100)])
    assert threads() == before
    for _ in range(20):
        plan.copy_()
        plan.flush()
    (own,) = set(threads()) - set(before)
    assert own.daemon
    plan.close()
    assert not own.is_alive()
    plan.close()
    plan.copy_()  # starts another
    plan.flush()
    assert len(set(threads()) - set(before)) == 1


@pytest.mark.parametrize("is_under_way", [False, True])
def test_a_deleted_plan_ends_its_thread(
    is_under_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threads()
    averaged, source = [torch.zeros(3000)], [torch.ones(3000)]
    plan = OffloadedPlan(averaged, source, staging_bytes=1024)
    gate = Gate(monkeypatch, "average")
    if not is_under_way:
        gate.open()
    plan.lerp_(0.5)
    assert gate.reached.wait(SECONDS)
    (own,) = set(threads()) - set(before)
    gone, memory = weakref.ref(plan), weakref.ref(plan._pieces[0])
    if not is_under_way:
        plan.flush()
    del plan
    gc.collect()
    assert gone() is None
    gate.open()
    own.join(SECONDS)
    assert not own.is_alive()
    gc.collect()
    assert memory() is None
    assert averaged[0].unique().tolist() == [0.5]  # finished all the same


PROGRAM = """
import atexit, os, sys, threading
import torch
averaged, source = [torch.zeros(3_000_000)], [torch.ones(3_000_000)]
torch.lerp(source[0], averaged[0], 0.5)  # torch's own threads exist
"""

AT_EXIT = """
@atexit.register  # before ema_fused does, so it runs after it
def look():
    print(averaged[0].unique().tolist())
from ema_fused.offloading.offloaded_plan import OffloadedPlan
plan = OffloadedPlan(averaged, source, staging_bytes=65536)
plan.lerp_(0.5)
"""

FORK = """
from ema_fused.offloading.offloaded_plan import OffloadedPlan
from ema_fused.offloading.staging import Piece
gate, reached, average = threading.Event(), threading.Event(), Piece.average
def held(piece, **given):
    reached.set()
    gate.wait()
    average(piece, **given)
plan = OffloadedPlan(averaged, source, staging_bytes=65536)
Piece.average = held
plan.lerp_(0.5)
reached.wait()
child = os.fork()
if child == 0:
    Piece.average = average
    plan.wait_until_read()
    plan.flush()
    plan.lerp_(1.0)
    plan.flush()
    plan.close()
    # Few of them: torch's threads for this thread stayed with the parent.
    os._exit(3 if set(averaged[0][::1000].tolist()) == {1.0} else 4)
gate.set()
_, status = os.waitpid(child, 0)
plan.flush()
print(os.waitstatus_to_exitcode(status), averaged[0].unique().tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (AT_EXIT, "[0.5]"),
        (AT_EXIT + "del plan\n", "[0.5]"),
        (FORK, "3 [0.5]"),
    ],
    ids=["exit", "exit of a deleted plan", "fork"],
)
def test_interpreters_end_and_fork_in_the_middle_of_an_update(program: str, expected: str) -> None:
    done = processes.run("-W", "ignore", "-c", PROGRAM + program)
    assert done.stderr == ""
    assert done.stdout.strip() == expected
