"""Clocks for work that a device does while the host goes on, and for the host's own part of it.

``CudaClock`` times with events in the stream. ``CpuClock`` has the same doors, so that everything
around the clocks runs, and is tested, on machines without a GPU.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from timing import Timing

Call = Callable[[], object]

# A sample repeats its call until it lasts this long: a thousand times the resolution of the events.
SAMPLE_SECONDS = 0.005
# However slow a contender is, its median is that of at least so many samples.
FEWEST_ROUNDS = 5
_MOST_CALLS = 1000


class Clock(Protocol):
    """What measuring asks of a device."""

    device: torch.device
    l2_bytes: int

    def seconds(self, call: Call, repeats: int) -> float:
        """Seconds of one call on the device, averaged over ``repeats`` calls."""

    def occupy(self, seconds: float) -> Callable[[], bool]:
        """Keep the device busy for about so long; the result tells whether it still is."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def free_bytes(self) -> int:
        """How much memory could be allocated now."""


class CudaClock:
    """Times with events in the current stream."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes: int = torch.cuda.get_device_properties(self.device).L2_cache_size
        cycles = 100_000_000
        seconds = self.seconds(lambda: torch.cuda._sleep(cycles), 1)
        self._cycles_per_second = cycles / seconds

    def seconds(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # One call goes ahead unmeasured: while it runs, the host gets to the next ones, so that
        # the first measured call doesn't wait for its launch.
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


class CpuClock:
    """Stands in where there is no GPU: the CPU does the work within the call."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = 1 << 16  # small, so that rehearsals rotate their buffers too

    def seconds(self, call: Call, repeats: int) -> float:
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
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def time_in_turns(
    clock: Clock,
    contenders: Mapping[str, Call],
    rounds: int,
    most_seconds: float,
    sample_seconds: float = SAMPLE_SECONDS,
) -> dict[str, Timing]:
    """Time each contender's call in interleaved rounds, whose order rotates.

    Ends early, after a few rounds at least, once ``most_seconds`` are over.
    """
    names = list(contenders)
    calls = {name: _calls_per_sample(clock, contenders[name], sample_seconds) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    with _no_collections():
        for turn in range(max(rounds, FEWEST_ROUNDS)):
            if turn >= FEWEST_ROUNDS and time.perf_counter() - start > most_seconds:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(clock.seconds(contenders[name], calls[name]))
    return {name: summary(samples[name], calls[name]) for name in names}


def time_host(
    clock: Clock, contenders: Mapping[str, Call], batches: int, calls: int
) -> tuple[dict[str, Timing], int]:
    """Time what calls take of the host alone, and count the batches that were thrown away.

    The device is kept busy meanwhile, so that no call finds it idle, and a batch is few calls, so
    that none waits for room in the launch queue. A batch that outlasted the device's work doesn't
    count.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    thrown_away = 0
    with _no_collections():
        busy_seconds = {name: _busy_seconds(call, calls) for name, call in contenders.items()}
        for _ in range(batches):
            for name, call in contenders.items():
                clock.synchronize()
                is_busy = clock.occupy(busy_seconds[name])
                batch = [_host_seconds(call) for _ in range(calls)]
                if is_busy():
                    samples[name] += batch
                else:
                    thrown_away += 1
                    busy_seconds[name] *= 2
        clock.synchronize()
    return {name: summary(found, 1) for name, found in samples.items()}, thrown_away


def _busy_seconds(call: Call, calls: int) -> float:
    """Well more than the host needs for a batch."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return 3 * (time.perf_counter() - start) + 1e-3


def summary(samples: list[float], calls: int) -> Timing:
    """The median of samples and the quartiles around it."""
    if len(samples) < 2:
        raise RuntimeError(f"{len(samples)} samples are no measurement")
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, len(samples), calls)


def _host_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _calls_per_sample(clock: Clock, call: Call, sample_seconds: float) -> int:
    call()  # the first call may prepare things that later ones reuse
    fastest = min(clock.seconds(call, 1) for _ in range(2))
    return max(1, min(_MOST_CALLS, int(sample_seconds / max(fastest, 1e-7)) + 1))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage collection waits: a collection hits whoever happens to be running."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
