"""A busy machine: single calls are timed while another process spins on each core."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

from ema_fused.bench.contenders import Group, rotating
from ema_fused.bench.timing import FEWEST_COLD_ROUNDS, Clock, Effort, single_calls, summary

# A call that moves more is sampled as often as the time of a case allows.
_SMALL_BYTES = 64 << 20
_TIMES_AS_MANY = 10  # samples at most, of those that a small list gets at least
# Ends by itself should it be left without its parent.
_SPIN = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def spinning(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``count`` processes that compute for nothing; they are killed at the end of the block."""
    with ExitStack() as ends:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _SPIN, str(os.getpid())],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            ends.callback(_end, process)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it spins from here on
        yield processes


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def measure_busy(clock: Clock, group: Group, effort: Effort) -> dict[str, Any]:
    """What a report says of the two contenders, ours and foreach, while all cores are taken."""
    calls = rotating(group.contenders)
    for call in calls.values():
        call()  # the first call may prepare things that later ones reuse
    small = group.bytes_moved <= _SMALL_BYTES
    fewest = effort.busy_rounds if small else FEWEST_COLD_ROUNDS
    many = replace(effort, rounds=_TIMES_AS_MANY * effort.busy_rounds)
    with spinning(cores()) as processes:
        samples = single_calls(calls, many, fewest)
    ours, foreach = (_figures(found) for found in samples.values())
    return {
        "condition": "busy",
        "spinning": len(processes),
        "limit": None,
        "ours_over_foreach": {key: ours[key] / foreach[key] for key in ours},
        "contenders": [
            {
                "name": name,
                "ratio": figures["median"] / ours["median"],
                "limit_fraction": None,
                "timing": asdict(summary(samples[name], 1)),
                "mean": figures["mean"],
                "percentile_99": figures["percentile_99"],
            }
            for name, figures in zip(calls, (ours, foreach), strict=True)
        ],
    }


def _figures(samples: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(samples),
        "median": statistics.median(samples),
        "percentile_99": statistics.quantiles(samples, n=100, method="inclusive")[98],
    }
