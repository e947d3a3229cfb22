"""Timing several contenders against each other in one run.

A machine's speed drifts while it is measured: clocks change, other programs come and go. So the
contenders take turns, a sample each a round, and what counts is the ratio of their medians. The
order within a round rotates, so that nobody always runs behind the same predecessor's caches.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A sample repeats its call until it lasts at least this long, far above the timer's resolution.
SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: the median over rounds, and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    calls_per_round: int


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    sample_seconds: float = SAMPLE_SECONDS,
) -> dict[str, Timing]:
    """Time each contender's call in ``rounds`` interleaved rounds (at least 2).

    Garbage collection waits meanwhile: a collection hits whoever happens to be running.
    """
    if rounds < 2:
        raise ValueError(f"rounds is {rounds}; quartiles need at least 2 rounds")
    calls = {name: _calls_per_sample(call, sample_seconds) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_seconds(contenders[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name], calls[name]) for name in names}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, averaged over ``repeats`` calls.

    One call goes ahead unmeasured: it pays for the caches that the previous contender filled,
    which would otherwise weigh the more, the fewer calls a sample has.
    """
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _calls_per_sample(call: Callable[[], object], sample_seconds: float) -> int:
    call()  # the first call may prepare things that later ones reuse
    fastest = min(_seconds(call, 1) for _ in range(3))
    return max(1, min(10_000, int(sample_seconds / max(fastest, 1e-7)) + 1))


def _summary(samples: list[float], calls: int) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, len(samples), calls)
