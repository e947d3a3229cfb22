"""Runs cases one after another: checks and times them, and compares with limit and peers.

The limit of an update is the time that its memory traffic takes. On the CPU that is measured by the
same traffic over one flat buffer on the same threads, in turns with the contenders; on a GPU, by a
large copy within the device, before and after all cases of the run.

On the CPU each case is measured with warm caches and with cold ones, which is what counts: in an
entry of the report ``timing``, ``ratio`` and ``limit_fraction`` are the cold ones, ``hot_timing``
and ``hot_ratio`` stand beside. ``condition`` says of an entry what the first three are.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ema_fused.bench.contenders import FLOAT32, WEIGHT, Dtypes, Group, rotating
from ema_fused.bench.environment import Environment
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import (
    FEWEST_COLD_ROUNDS,
    FEWEST_ROUNDS,
    Call,
    Clock,
    Effort,
    Timing,
    time_cold,
    time_host,
    time_in_turns,
)
from ema_fused.bench.touching import Touching
from ema_fused.engine import backends

LIMIT = "limit"
# The fraction of free memory to use; allocator rounding and libraries need the rest.
MEMORY_SHARE = 0.9
# A number of calls whose launches fit into the launch queue of about 1,000.
_HOST_CALLS = 8
_COPY_BYTES, _LEAST_COPY_BYTES = 4 << 30, 1 << 20

Report = dict[str, Any]


class CannotMeasureError(Exception):
    """A case can't be measured on this machine; the message says why."""


@dataclass(frozen=True)
class Case:
    """A group of contenders on one model's shapes, made when its turn comes.

    Attributes:
        kind: ``lists``, ``several``, ``models``, ``peer``, ``compiled``, ``sharded``, ``apex``,
            ``busy``, ``step``, ``growth`` (warm caches alone: its fit needs many repeats) or
            ``host`` (time of the host alone).
        peer: the package of the other contenders.
        title: the name of the operation, for tables.
        shapes: of the parameters.
        dtypes: of averages and sources.
        bytes_needed: the most memory that the case needs.
        make: makes the contenders on new tensors.
        measure: returns what the report says of them, where a case has a way of its own.

    Raises:
        CannotMeasureError: by ``make``.
    """

    kind: str
    peer: str
    title: str
    shapes: Shapes
    dtypes: Dtypes
    bytes_needed: int
    make: Callable[[], Group]
    measure: Callable[[Clock, Group, Effort], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """The name for messages and the progress bar."""
        return f"{self.shapes.title}, {self.dtypes.name}, {self.title}"


class Run:
    """One run of the benchmark, with a time limit; collects the report.

    Attributes:
        report: all that was measured, ready for JSON.

    Raises:
        ValueError: no native kernel of ours serves the device.
    """

    def __init__(
        self, clock: Clock, effort: Effort, environment: Environment, seconds: float = math.inf
    ) -> None:
        self.clock, self.effort = clock, effort
        reason = _why_not_ours(clock.device)
        if reason is not None:
            raise ValueError(
                f"nothing of ours would be measured on {clock.device}, because {reason}; "
                "python -m ema_fused info says more"
            )
        self._end = time.monotonic() + seconds
        self._copies: list[tuple[int, Timing]] = []
        self._touch = Touching(effort)
        self.report: Report = {
            "environment": environment,
            "touched": {"bytes": self._touch.bytes, "objects": self._touch.objects},
            "copy": None,
            "cases": [],
            "failed": [],
            "left_out": [],
        }

    def measure(self, cases: Iterable[Case]) -> Iterator[Case]:
        """Measures all cases and yields each one when done; the report is valid after each."""
        if self.clock.device.type == "cuda":
            self._copies.append(self._copy())
        for case in cases:
            self._attempt(case)
            self._judge()
            yield case
        if self._copies:
            self._copies.append(self._copy())
            self._judge()

    def leave_out(self, what: str, reason: str) -> None:
        """Records a case that isn't measured, and the reason."""
        self.report["left_out"].append({"case": what, "reason": reason})

    def _attempt(self, case: Case) -> None:
        """Measure, or record why not: a run that has come so far shouldn't end at one case."""
        free = int(self.clock.free_bytes() * MEMORY_SHARE)  # and no garbage is left
        # Modules and results so far: collections from here on walk the objects of this case alone.
        gc.freeze()
        if time.monotonic() > self._end:
            self._fail(case, "no time was left")
        elif case.bytes_needed > free:
            needs = f"{case.bytes_needed / 1e9:.1f} GB"
            self.leave_out(case.name, f"it may need {needs}, and {free / 1e9:.1f} are to be had")
        else:
            try:
                self._measure(case)
            except CannotMeasureError as reason:
                self.leave_out(case.name, str(reason))
            except Exception as error:
                self._fail(case, first_line(error))

    def _fail(self, case: Case, reason: str) -> None:
        self.report["failed"].append({"case": case.name, "reason": reason})

    def _measure(self, case: Case) -> None:
        group = case.make()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # True, but irrelevant here: the time of a 16-bit average is measured, not its
                # precision.
                warnings.filterwarnings("ignore", message="averages are kept in 16 bits")
                group.check()
                measure = case.measure or partial(self._timed, case.kind)
                found = measure(self.clock, group, self.effort)
        finally:
            group.close()
        self.report["cases"].append(self._described(case, group) | found)

    def _timed(self, kind: str, clock: Clock, group: Group, effort: Effort) -> dict[str, Any]:
        calls = rotating(group.contenders)
        if kind == "host":
            return self._host(calls)
        if clock.device.type != "cpu":
            return {"condition": "device"} | _told(time_in_turns(clock, calls, effort))
        limit = {LIMIT: group.limit or flat_traffic(group.bytes_moved)}
        if kind == "growth":
            return {"condition": "hot"} | _told(time_in_turns(clock, calls | limit, effort))
        hot = time_in_turns(clock, calls, effort)
        return {"condition": "cold"} | _told(time_cold(calls | limit, effort, self._touch), hot)

    def _host(self, calls: dict[str, Call]) -> dict[str, Any]:
        batches = self.effort.host_batches
        hot, hot_thrown_away = time_host(self.clock, calls, batches, _HOST_CALLS)
        # A batch of one call: the second one would find the caches warm. Touching takes long, so
        # there are fewer batches.
        batches = max(batches // 2, FEWEST_COLD_ROUNDS)
        cold, thrown_away = time_host(self.clock, calls, batches, 1, self._touch)
        return {
            "condition": "cold",
            "batches_thrown_away": thrown_away,
            "hot_batches_thrown_away": hot_thrown_away,
        } | _told(cold, hot)

    def _described(self, case: Case, group: Group) -> dict[str, Any]:
        return {
            "kind": case.kind,
            "peer": case.peer,
            "title": case.title,
            "model": case.shapes.key,
            "model_title": case.shapes.title,
            "dtypes": case.dtypes.name,
            "tensors": len(case.shapes.shapes),
            "elements": case.shapes.elements,
            "bytes_moved": group.bytes_moved,
            "buffer_sets": len(group.contenders[0].calls),
            "launches": group.launches,
        }

    def _copy(self) -> tuple[int, Timing]:
        """The size in bytes of a copy within the device, and its time."""
        size = _COPY_BYTES if self.effort.rounds > FEWEST_ROUNDS else _LEAST_COPY_BYTES
        while size > _LEAST_COPY_BYTES and self.clock.free_bytes() * MEMORY_SHARE < 2 * size:
            size //= 2
        source = torch.full((size // 4,), WEIGHT, device=self.clock.device)
        target = torch.empty_like(source)
        copy = {LIMIT: partial(target.copy_, source)}
        timing = time_in_turns(self.clock, copy, self.effort)[LIMIT]
        if not torch.equal(source, target):
            raise AssertionError("the copy is not equal to its source")
        return size, timing

    def _judge(self) -> None:
        """Relates all cases to the fastest copy, the stricter limit."""
        if not self._copies:
            return
        rates = [2 * size / timing.median for size, timing in self._copies]
        self.report["copy"] = {
            "buffer_bytes": [size for size, _ in self._copies],
            "bytes_per_second": rates,
            "timings": [asdict(timing) for _, timing in self._copies],
        }
        for case in self.report["cases"]:
            if case["kind"] == "host":
                continue
            seconds = case["bytes_moved"] / max(rates)
            for contender in case["contenders"]:
                contender["limit_fraction"] = seconds / contender["timing"]["median"]


def first_line(error: Exception) -> str:
    """What an error says of itself, as one reason among others."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _told(timings: dict[str, Timing], hot: dict[str, Timing] | None = None) -> dict[str, Any]:
    """What a report says of these timings, the first of which is ours, and of those beside them."""
    limit = timings.get(LIMIT)
    found = {name: timing for name, timing in timings.items() if name != LIMIT}
    first = next(iter(found))
    contenders = []
    for name, timing in found.items():
        contender = {
            "name": name,
            "ratio": timing.median / found[first].median,
            "limit_fraction": None if limit is None else limit.median / timing.median,
            "timing": asdict(timing),
        }
        if hot is not None:
            contender["hot_ratio"] = hot[name].median / hot[first].median
            contender["hot_timing"] = asdict(hot[name])
        contenders.append(contender)
    return {"limit": None if limit is None else asdict(limit), "contenders": contenders}


def _why_not_ours(device: torch.device) -> str | None:
    """Why no native kernel would run on ``device``; None if one would."""
    pinned = backends.pinned(None)
    if pinned not in (None, device.type):
        return f"EMA_FUSED_BACKEND pins {pinned}"
    return backends.why_not_on(device)


def limit_bytes(bytes_moved: int) -> int:
    """The memory of the flat buffers of :func:`flat_traffic`, in bytes."""
    return 8 * (bytes_moved // FLOAT32.bytes_moved() + 1)


def flat_traffic(bytes_moved: int) -> Call:
    """An update of one flat float32 buffer that reads and writes ``bytes_moved`` bytes."""
    elements = max(1, bytes_moved // FLOAT32.bytes_moved())
    averaged, source = torch.ones(elements), torch.ones(elements)
    return partial(averaged.lerp_, source, WEIGHT)
