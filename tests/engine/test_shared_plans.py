"""One plan used by several threads, and by a fork of a process whose thread was using it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ema_fused import Plan, lerp_
from ema_fused.engine import backends
from tests import processes

THREADS = 3
ROUNDS = 40

pytestmark = pytest.mark.skipif(backends.native() is None, reason="plans of the extension")


def at_once(work: Callable[[], object]) -> None:
    """Runs ``work`` in several threads that begin together; raises what one of them raised."""
    errors: list[BaseException] = []
    begin = threading.Barrier(THREADS)

    def run() -> None:
        begin.wait()
        try:
            for _ in range(ROUNDS):
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def pairs() -> tuple[list[Tensor], list[Tensor]]:
    """Large enough that launches of several threads would overlap."""
    torch.manual_seed(0)
    sizes = (400_000, 3, 800_000)
    return [torch.randn(n) for n in sizes], [torch.randn(n) for n in sizes]


def test_updates_of_several_threads_all_count() -> None:
    averaged, source = pairs()
    expected = [tensor.clone() for tensor in averaged]
    one_after_another = Plan(expected, source)
    for _ in range(THREADS * ROUNDS):
        one_after_another.lerp_(0.01)
    plan = Plan(averaged, source)
    with switching_often():
        at_once(lambda: plan.lerp_(0.01))
    assert all(map(torch.equal, averaged, expected))


def test_swaps_of_several_threads_exchange_whole_tensors() -> None:
    averaged, source = pairs()
    expected = [tensor.clone() for tensor in (*averaged, *source)]
    plan = Plan(averaged, source)
    assert THREADS * ROUNDS % 2 == 0
    at_once(plan.swap_)
    assert all(map(torch.equal, (*averaged, *source), expected))


def test_lists_of_several_threads_find_one_plan() -> None:
    averaged, source = pairs()
    expected = [tensor.clone() for tensor in averaged]
    for _ in range(THREADS * ROUNDS + 1):
        lerp_(expected, source, 0.01)
    lerp_(averaged, source, 0.01)
    at_once(lambda: lerp_(averaged, source, 0.01))
    assert all(map(torch.equal, averaged, expected))


def test_a_plan_is_not_used_in_the_middle_of_its_own_use() -> None:
    """torch asks a function mode when the plan asks whether a complex tensor is conjugated."""
    averaged, source = (
        [torch.zeros(3, dtype=torch.complex64)],
        [torch.ones(3, dtype=torch.complex64)],
    )
    plan = Plan(averaged, source, backend="cpu")

    class Interfering(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            plan.lerp_(0.5)
            return function(*args, **(kwargs or {}))

    message = "used by code that runs while it looks at its tensors"
    with Interfering(), pytest.raises(RuntimeError, match=message):
        plan.lerp_(0.5)
    assert torch.equal(averaged[0], torch.zeros(3, dtype=torch.complex64))
    plan.lerp_(1.0)
    assert torch.equal(averaged[0], source[0])


FORK = """
import os, signal, threading
import torch, ema_fused
torch.set_num_threads(1)
averaged, source = [torch.zeros(2_000_000)], [torch.ones(2_000_000)]
plan = ema_fused.Plan(averaged, source)
over = False
def use():
    while not over:
        plan.lerp_(0.5)
thread = threading.Thread(target=use, daemon=True)
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that waits for a thread that it doesn't have
        # New threads, to which the system may give the number of the one that the child lacks.
        updated = []
        threads = [threading.Thread(target=lambda: updated.append(plan.lerp_(1.0))) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0 if len(updated) == 2 and torch.equal(*averaged, *source) else 1)
    assert os.waitpid(child, 0)[1] == 0
over = True
thread.join()
print("done")
"""


@pytest.mark.slow
def test_a_fork_goes_on_without_the_thread_that_held_the_plan() -> None:
    assert processes.run("-W", "ignore", "-c", FORK).stdout == "done\n"
