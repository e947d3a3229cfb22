"""Timing calls against each other in one process.

A machine's speed drifts while it is measured: clock rates change, other programs start and stop. So
contenders take turns, with one sample each per round, and the result is the ratio of their medians.
The order within a round rotates, so that no contender always runs with the caches left by the same
predecessor.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

Call = Callable[[], object]

# The smallest number of samples for a median, even of a slow contender; single calls vary more.
FEWEST_ROUNDS, FEWEST_COLD_ROUNDS = 5, 9
_MOST_CALLS = 10_000


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over rounds, and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    calls_per_round: int


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: samples of each contender, at least :data:`FEWEST_ROUNDS`.
        sample_seconds: a sample repeats its call for about this long.
        case_seconds: a case ends after this time, but not before :data:`FEWEST_ROUNDS` rounds.
        host_batches: number of batches for measuring the host's time.
        cold_bytes: how much memory is touched before a sample with cold caches.
        cold_objects: how many Python objects are touched then.
        busy_rounds: samples on a busy machine, at least, of calls that aren't large.
    """

    rounds: int = 40
    sample_seconds: float = 0.002  # far above the resolution of clocks and events
    case_seconds: float = 4.0
    host_batches: int = 30
    cold_bytes: int = 256 << 20
    cold_objects: int = 100_000
    busy_rounds: int = 300


# The shortest possible run, for tests and trial runs.
NO_EFFORT = Effort(
    rounds=FEWEST_ROUNDS,
    sample_seconds=0.0,
    case_seconds=0.0,
    host_batches=2,
    cold_bytes=1 << 16,
    cold_objects=100,
    busy_rounds=FEWEST_COLD_ROUNDS,
)


class Clock(Protocol):
    """The functions for measuring on a device."""

    device: torch.device
    # The size of the cache that must not hold a buffer between two uses; 0: caches may be warm.
    cache_bytes: int

    def seconds(self, call: Call, repeats: int) -> float:
        """Seconds of one call on the device, averaged over ``repeats`` calls."""

    def occupy(self, seconds: float) -> Callable[[], bool]:
        """Keeps the device busy for about ``seconds``; returns a function: is it still busy?"""

    def synchronize(self) -> None:
        """Waits until the device has finished all work."""

    def free_bytes(self) -> int:
        """How many bytes could be allocated now."""


class CpuClock:
    """Times calls on the CPU, where the work is done within the call, with warm caches.

    :func:`time_cold` has them as a training step leaves them.
    """

    def __init__(self, cache_bytes: int = 0) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = cache_bytes

    def seconds(self, call: Call, repeats: int) -> float:
        # The first call isn't measured: it is slow because the previous contender filled the
        # caches, which would distort samples of few calls most.
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def occupy(self, seconds: float) -> Callable[[], bool]:
        return lambda: True

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        gc.collect()
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            free = next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024
        except (OSError, StopIteration):
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(free, _left_to_container())


def _left_to_container() -> int:
    """The bytes left in the control group's limit; /proc/meminfo is for the whole machine."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (folder / f"memory.{name}").read_text().strip() for name in ("max", "current")
        )
        return sys.maxsize if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return sys.maxsize


class CudaClock:
    """Times calls with events in the current stream, on buffers that aren't in the L2 cache."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes: int = torch.cuda.get_device_properties(self.device).L2_cache_size
        cycles = 100_000_000
        seconds = self.seconds(lambda: torch.cuda._sleep(cycles), 1)
        self._cycles_per_second = cycles / seconds

    def seconds(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The first call isn't measured: while it runs, the host enqueues the next ones, so that the
        # device doesn't wait for the launch of the first measured call.
        call()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / repeats

    def occupy(self, seconds: float) -> Callable[[], bool]:
        torch.cuda._sleep(int(seconds * self._cycles_per_second))
        done = torch.cuda.Event()
        done.record()
        return lambda: not done.query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def clock_of(device: str) -> Clock:
    """The clock of ``"cpu"`` or ``"cuda"``."""
    return CudaClock() if device == "cuda" else CpuClock()


def time_in_turns(
    clock: Clock, contenders: Mapping[str, Call], effort: Effort
) -> dict[str, Timing]:
    """Times the contenders' calls in interleaved rounds, whose order rotates.

    Garbage collection is off meanwhile: it would slow whichever contender happens to run.
    """
    names = list(contenders)
    calls = {name: _calls_per_sample(clock, contenders[name], effort) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    with no_collections():
        for order in turns(names, effort, FEWEST_ROUNDS):
            for name in order:
                samples[name].append(clock.seconds(contenders[name], calls[name]))
    return {name: summary(samples[name], calls[name]) for name in names}


def time_cold(contenders: Mapping[str, Call], effort: Effort, touch: Call) -> dict[str, Timing]:
    """As :func:`time_in_turns` on the CPU, but a sample is one call right after ``touch``."""
    for call in contenders.values():
        call()  # the first call may prepare things that later ones reuse
    samples = single_calls(contenders, effort, FEWEST_COLD_ROUNDS, touch)
    return {name: summary(found, 1) for name, found in samples.items()}


def single_calls(
    contenders: Mapping[str, Call], effort: Effort, fewest: int, touch: Call = lambda: None
) -> dict[str, list[float]]:
    """Seconds of single calls in rounds as those of :func:`turns`, each right after ``touch``."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with no_collections():
        for order in turns(list(contenders), effort, fewest):
            for name in order:
                touch()
                samples[name].append(one_call(contenders[name]))
    return samples


def turns(names: Sequence[str], effort: Effort, fewest: int) -> Iterator[list[str]]:
    """The order of each round, until time or rounds run out, but for ``fewest`` rounds at least."""
    start = time.perf_counter()
    for turn in range(max(effort.rounds, fewest)):
        if turn >= fewest and time.perf_counter() - start > effort.case_seconds:
            return
        first = turn % len(names)
        yield [*names[first:], *names[:first]]


def _calls_per_sample(clock: Clock, call: Call, effort: Effort) -> int:
    call()  # the first call may prepare things that later ones reuse
    fastest = clock.seconds(call, 1)
    if fastest < effort.sample_seconds:  # further samples are cheap
        fastest = min(fastest, *(clock.seconds(call, 1) for _ in range(2)))
    return max(1, min(_MOST_CALLS, int(effort.sample_seconds / max(fastest, 1e-7)) + 1))


def time_host(
    clock: Clock,
    contenders: Mapping[str, Call],
    batches: int,
    calls: int,
    touch: Call = lambda: None,
) -> tuple[dict[str, Timing], int]:
    """Times calls on the host alone; also returns how many batches were discarded.

    The device is kept busy meanwhile, so that launches are only enqueued, and a batch has few
    calls, so that the launch queue is never full. A batch that took longer than the device's work
    is discarded. With cold caches a batch is one call, and ``touch`` comes before it.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    thrown_away = 0
    with no_collections():
        busy_seconds = {
            name: _busy_seconds(call, calls, touch) for name, call in contenders.items()
        }
        for _ in range(batches):
            for name, call in contenders.items():
                clock.synchronize()
                is_busy = clock.occupy(busy_seconds[name])
                touch()
                batch = [one_call(call) for _ in range(calls)]
                if is_busy():
                    samples[name] += batch
                else:
                    thrown_away += 1
                    busy_seconds[name] *= 2
        clock.synchronize()
    return {name: summary(found, 1) for name, found in samples.items()}, thrown_away


def _busy_seconds(call: Call, calls: int, touch: Call) -> float:
    """Seconds to keep the device busy: well more than the host needs for a batch."""
    call()
    start = time.perf_counter()
    touch()
    for _ in range(calls):
        call()
    return 3 * (time.perf_counter() - start) + 1e-3


def one_call(call: Call) -> float:
    """Seconds that the host is in the call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(samples: list[float], calls: int) -> Timing:
    """The median of samples and the quartiles around it."""
    if len(samples) < 2:
        raise RuntimeError(
            f"{len(samples)} samples are no measurement: no batch ended while the device was busy"
        )
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, len(samples), calls)


@contextmanager
def no_collections() -> Iterator[None]:
    """Garbage collection is off within the block."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
