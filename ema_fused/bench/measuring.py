"""Runs cases one after another: checks and times them, and compares with limit and peers.

The limit of an update is the time that its memory traffic takes. On the CPU that is measured by the
same traffic over one flat buffer on the same threads, in turns with the contenders; on a GPU, by a
large copy within the device, before and after all cases of the run.
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
    FEWEST_ROUNDS,
    Call,
    Clock,
    Effort,
    Timing,
    time_host,
    time_in_turns,
)
from ema_fused.engine import backends

LIMIT = "limit"
# The fraction of free memory to use; allocator rounding and libraries need the rest.
MEMORY_SHARE = 0.9
# A number of calls whose launches fit into the launch queue of about 1,000.
_HOST_CALLS = 8
_COPY_BYTES, _LEAST_COPY_BYTES = 4 << 30, 1 << 20

Report = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A group of contenders on one model's shapes, made when its turn comes.

    Attributes:
        kind: ``lists``, ``several``, ``models``, ``peer``, ``growth`` or ``host`` (time of the host
            alone).
        peer: the package of the other contenders.
        title: the name of the operation, for tables.
        shapes: of the parameters.
        dtypes: of averages and sources.
        bytes_needed: the most memory that the case needs.
        make: makes the contenders on new tensors.
    """

    kind: str
    peer: str
    title: str
    shapes: Shapes
    dtypes: Dtypes
    bytes_needed: int
    make: Callable[[], Group]

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
        self.report: Report = {
            "environment": environment,
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
            except Exception as error:
                self._fail(case, f"{type(error).__name__}: {error}".splitlines()[0])

    def _fail(self, case: Case, reason: str) -> None:
        self.report["failed"].append({"case": case.name, "reason": reason})

    def _measure(self, case: Case) -> None:
        group = case.make()
        with torch.no_grad(), warnings.catch_warnings():
            # True, but irrelevant here: the time of a 16-bit average is measured, not its
            # precision.
            warnings.filterwarnings("ignore", message="averages are kept in 16 bits")
            group.check()
            entry = self._described(case, group)
            if case.kind == "host":
                timings, entry["batches_thrown_away"] = time_host(
                    self.clock, rotating(group.contenders), self.effort.host_batches, _HOST_CALLS
                )
            else:
                timings = time_in_turns(self.clock, self._calls(group), self.effort)
        limit = timings.pop(LIMIT, None)
        entry["limit"] = None if limit is None else asdict(limit)
        ours = next(iter(timings.values())).median
        entry["contenders"] = [
            {
                "name": name,
                "ratio": found.median / ours,
                "limit_fraction": None if limit is None else limit.median / found.median,
                "timing": asdict(found),
            }
            for name, found in timings.items()
        ]
        self.report["cases"].append(entry)

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

    def _calls(self, group: Group) -> dict[str, Call]:
        calls = rotating(group.contenders)
        if self.clock.device.type == "cpu":
            calls[LIMIT] = group.limit or flat_traffic(group.bytes_moved)
        return calls

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
