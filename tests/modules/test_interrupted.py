"""Signals that arrive while averages are exchanged: everything is on its side afterwards."""

from __future__ import annotations

import _thread
import gc
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.plan import Plan
from ema_fused.engine.undisturbed import certainly, undisturbed
from ema_fused.modules import swapping
from tests.interrupting import Interruption
from tests.networks import differences, snapshot
from tests.processes import run

HOLDING = ("undisturbed", "certainly", "certainly.<locals>.begin", "_Held.begin", "_Held.end")
EXCHANGE = (*HOLDING, "Exchange.put_in", "Exchange._put", "Exchange.take_out", "Exchange._put_back")
BLOCK = (*EXCHANGE, "Swapped.__enter__", "Swapped.__exit__", "Swapped._leave", "_Block.enter")
BLOCK = (*BLOCK, "_Block.leave", "_Block.__del__", "swap_all", "_swap")

OPTIONS: dict[str, dict[str, Any]] = {
    "swapped": {},
    "overwritten": {"averaged_dtype": torch.float64},
    "foreach": {"backend": "foreach"},
}


def trained(**options: Any) -> tuple[nn.Module, ExponentialMovingAverage]:
    """A model and its average, which differ."""
    model = nn.Linear(2, 2)
    averaged = ExponentialMovingAverage(model, 0.25, **options)
    for _ in range(2):
        averaged.update_parameters(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    return model, averaged


class Sides:
    """What a model and its average hold outside of any exchange."""

    def __init__(self, model: nn.Module, averaged: ExponentialMovingAverage) -> None:
        self.sides = [(module, snapshot(module)) for module in (model, averaged.module)]

    def hold(self) -> bool:
        return all(differences(snapshot(module), held) == [] for module, held in self.sides)


def everywhere(
    function: Callable[[], object],
    functions: tuple[str, ...],
    check: Callable[[BaseException | None, str], None],
) -> int:
    """Interrupts ``function`` before each bytecode of ``functions``, one by one; counts them."""
    at = 0
    while True:
        interruption = Interruption(at, functions)
        raised = interruption.run(function)
        if not interruption.happened:
            assert raised is None
            return at
        check(raised, interruption.where)
        at += 1


@pytest.mark.parametrize(
    "options",
    [
        "swapped",
        pytest.param("overwritten", marks=pytest.mark.slow),
        pytest.param("foreach", marks=pytest.mark.slow),
    ],
)
def test_a_signal_anywhere_leaves_both_sides_as_they_were(options: str) -> None:
    model, averaged = trained(**OPTIONS[options])
    sides = Sides(model, averaged)
    entered: list[bool] = []
    handler = signal.getsignal(signal.SIGINT)

    def evaluate() -> None:
        with averaged.swapped(model):
            entered.append(not sides.hold())
            gc.is_tracked(model)  # a call, after which signals are looked for

    def check(raised: BaseException | None, where: str) -> None:
        assert isinstance(raised, KeyboardInterrupt), where
        assert sides.hold(), where
        assert all(entered), where
        assert not swapping._swapped, where
        assert not model._state_dict_pre_hooks, where
        assert not model._load_state_dict_pre_hooks, where
        assert signal.getsignal(signal.SIGINT) is handler, where

    assert everywhere(evaluate, BLOCK, check) > 500


def test_a_signal_before_the_first_line_of_exit_is_repaired_with_its_traceback() -> None:
    model, averaged = trained()
    sides = Sides(model, averaged)
    try:
        with averaged.swapped(model):
            # The interruption comes in an iterator, after which nobody looks for signals.
            [_] = map(_thread.interrupt_main, [signal.SIGINT])
    except KeyboardInterrupt:
        if not sides.hold():
            with pytest.raises(RuntimeError, match="while averaged weights are swapped in"):
                model.state_dict()
    assert sides.hold()
    assert not swapping._swapped
    assert model.state_dict()


def test_a_block_that_is_never_left_ends_with_its_context_manager() -> None:
    model, averaged = trained()
    sides = Sides(model, averaged)
    block = averaged.swapped(model)
    block.__enter__()
    assert not sides.hold()
    del block
    assert sides.hold()
    assert model.state_dict()


@pytest.mark.parametrize("options", OPTIONS)
def test_an_exchange_knows_what_is_where_after_a_signal_anywhere(options: str) -> None:
    """As hooks do it, which take out later what an evaluation that raised has left."""
    model, averaged = trained(**OPTIONS[options])
    sides = Sides(model, averaged)
    exchange = averaged.exchange_with(model)

    def put_in_and_go_on() -> None:
        exchange.put_in()
        gc.is_tracked(model)
        exchange.take_out()

    def check_both(raised: BaseException | None, where: str) -> None:
        assert isinstance(raised, KeyboardInterrupt), where
        assert exchange.is_in != sides.hold(), where
        exchange.take_out()
        assert not exchange.is_in, where
        assert sides.hold(), where

    assert everywhere(put_in_and_go_on, EXCHANGE, check_both) > 300


def test_what_put_in_raises_has_put_nothing_in() -> None:
    model, averaged = trained()
    sides = Sides(model, averaged)
    exchange = averaged.exchange_with(model)

    def check(raised: BaseException | None, where: str) -> None:
        assert isinstance(raised, KeyboardInterrupt), where
        assert not exchange.is_in, where
        assert sides.hold(), where

    assert everywhere(exchange.put_in, ("Exchange._put",), check) > 10
    assert exchange.is_in
    assert not sides.hold()


# What holds signals back.


class ArrivedError(Exception):
    """Raised by a handler."""


@pytest.fixture
def raising() -> Iterator[list[int]]:
    """The numbers of the signals that arrived; a handler for SIGTERM and SIGUSR1 raises."""
    arrived: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        raise ArrivedError(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield arrived
    for number, former in before.items():
        signal.signal(number, former)


def test_all_handlers_wait_and_are_called_once(raising: list[int]) -> None:
    done = []

    def operation() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        assert raising == []
        done.append(True)

    with pytest.raises(ArrivedError):
        undisturbed(operation)
    assert done == [True]
    assert sorted(raising) == sorted([signal.SIGTERM, signal.SIGUSR1])
    with pytest.raises(ArrivedError):
        signal.raise_signal(signal.SIGTERM)


def test_it_is_undone_if_a_handler_raises_and_only_then(raising: list[int]) -> None:
    undone = []
    assert undisturbed(lambda: 5, lambda: undone.append(1)) == 5
    with pytest.raises(ZeroDivisionError):
        undisturbed(lambda: 1 // 0, lambda: undone.append(2))
    with pytest.raises(ArrivedError):
        undisturbed(lambda: signal.raise_signal(signal.SIGUSR1), lambda: undone.append(3))
    assert undone == [3]


def test_one_inside_another_waits_for_the_outer_one(raising: list[int]) -> None:
    def outer() -> None:
        undisturbed(lambda: signal.raise_signal(signal.SIGTERM))
        certainly(lambda: signal.raise_signal(signal.SIGTERM))
        assert raising == []

    with pytest.raises(ArrivedError):
        undisturbed(outer)
    assert raising == [signal.SIGTERM]


def test_handlers_that_are_not_in_the_way_stay() -> None:
    handlers = [signal.getsignal(number) for number in range(1, 32)]
    undisturbed(lambda: None)
    with pytest.raises(ZeroDivisionError):
        undisturbed(lambda: 1 // 0)
    assert [signal.getsignal(number) for number in range(1, 32)] == handlers


def test_a_handler_that_is_set_meanwhile_stays() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        undisturbed(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_there_is_nothing_to_hold_back() -> None:
    model, averaged = trained()
    sides = Sides(model, averaged)
    found = []

    def evaluate() -> None:
        with averaged.swapped(model):
            found.append(sides.hold())

    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    assert found == [False]
    assert sides.hold()


# Errors in the middle.


class RunsOut(TorchDispatchMode):
    """Memory for so many copies, and no more."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.left = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("no memory left")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", ["overwritten", "foreach"])
def test_memory_that_runs_out_leaves_everything_where_it_was(options: str) -> None:
    model, averaged = trained(**{"backend": "foreach", **OPTIONS[options]})
    sides = Sides(model, averaged)
    failed = 0
    for copies in range(100):
        try:
            with RunsOut(copies) as memory, averaged.swapped(model):
                memory.left = 1000
        except torch.OutOfMemoryError:
            failed += 1
            assert sides.hold(), copies
            assert not swapping._swapped
        else:
            break
    assert failed >= 2
    assert sides.hold()


def test_an_error_of_the_block_and_one_at_its_end_are_both_told() -> None:
    model, averaged = trained()
    with pytest.raises(RuntimeError, match="can't be put back") as raised, averaged.swapped(model):
        model.half()
        raise LookupError("in the block")
    told = []
    error: BaseException | None = raised.value
    while error is not None:
        told.append(type(error))
        error = error.__context__
    assert told == [RuntimeError, ValueError, LookupError]


# From outside, at any time.


@pytest.mark.slow
def test_interrupted_at_random_again_and_again() -> None:
    lines = run("tests/modules/interrupted_run.py").stdout.split()
    assert lines[0] == "held"
    assert int(lines[1]) > 10


def test_a_swap_of_several_parts_is_done_as_one() -> None:
    """Here a part of the native kernels and one of torch's functions (for what isn't dense)."""
    averaged = [torch.zeros(2), torch.zeros(2, 2)[:, 0]]
    source = [torch.ones(2), torch.ones(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        plan = Plan(averaged, source)

    def check(raised: BaseException | None, where: str) -> None:
        assert isinstance(raised, KeyboardInterrupt), where
        values = {float(tensor[0]) for tensor in averaged}
        assert len(values) == 1, where
        assert {float(tensor[0]) for tensor in source} == {1 - value for value in values}, where

    functions = (*HOLDING, "Plan._swap_parts", "swap_all", "_swap_part", "_swap")
    assert everywhere(plan.swap_, functions, check) > 50
