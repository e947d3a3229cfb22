"""How fast an averaged update is on a GPU, against the card's own copy and every other way.

    python benchmarks/gpu_speed.py [--json FILE] [--markdown FILE] [--seconds 230] [--quick]
    python benchmarks/gpu_speed.py --device cpu --quick     # the same code, no measurement

The ceiling is what a plain copy within the device moves in this very run. Before anything is timed,
each contender's result is compared with torch's, to the bit where both round alike. Contenders take
turns, and what counts is the ratio of their medians. Exit status 77: there is no GPU; 1: a case
failed (the others are written all the same). What doesn't fit the memory is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_clock
import gpu_contenders
import gpu_device
import gpu_report
import shapes
import torch
from contenders import WEIGHT
from gpu_clock import Clock
from gpu_contenders import BFLOAT16, FLOAT32, PAIRS, Group, Pair
from gpu_sets import BYTES_A_PARAMETER, MEMORY_SHARE, ModelSet, model_sets
from timing import Timing

HOST_TENSORS = (161, 1000, 5000)
HOST_ELEMENTS = 16
AVERAGES = (1, 2, 4)

_ROUNDS, _HOST_BATCHES = 25, 30
_HOST_CALLS = 8  # a batch; foreach's launches of 5,000 tensors still fit the queue of about 1,000
_CASE_SECONDS = 5.0
_COPY_BYTES = 4 << 30
_LEAST_COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """One group of contenders on one model."""

    kind: str  # lists, models or averages
    model: ModelSet
    pair: Pair
    averages: int = 1

    @property
    def name(self) -> str:
        several = f", {self.averages} averages" if self.kind == "averages" else ""
        return f"{self.model.title}, {self.pair.name}, {self.kind}{several}"

    def sets(self, clock: Clock) -> int:
        """How many buffer sets take turns."""
        held = self.model.elements * self.pair.bytes_held(self.averages)
        return gpu_contenders.sets_needed(held, clock.l2_bytes)

    def bytes_needed(self, clock: Clock) -> int:
        """At most so much memory is taken."""
        a_parameter = max(BYTES_A_PARAMETER, self.pair.bytes_held(self.averages))
        return self.model.elements * a_parameter * self.sets(clock)

    def group(self, clock: Clock) -> Group:
        """The contenders on new buffers."""
        wanted, sets = self.model.shapes, self.sets(clock)
        if self.kind == "averages":
            return gpu_contenders.averages_group(wanted, self.averages, clock.device, sets)
        make = gpu_contenders.model_group if self.kind == "models" else gpu_contenders.list_group
        return make(wanted, self.pair, clock.device, sets)


def cases(models: list[ModelSet]) -> Iterator[Case]:
    """Everything that is timed on the device; the main things first, should time run out."""
    for pair in PAIRS:
        for model in models:
            yield Case("lists", model, pair)
    for averages in AVERAGES:
        yield Case("averages", models[0], FLOAT32, averages)
    for pair in (FLOAT32, BFLOAT16):  # torch's AveragedModel takes no mixed dtypes
        for model in models:
            yield Case("models", model, pair)


class Run:
    """One run: a clock, an end, and the report that grows."""

    def __init__(self, clock: Clock, seconds: float, quick: bool, seed: int) -> None:
        self.clock, self.quick, self.seed = clock, quick, seed
        self.end = time.monotonic() + seconds
        self.report: dict[str, Any] = {
            "environment": gpu_device.environment(clock.device),
            "rehearsal": clock.device.type == "cpu",
            "quick": quick,
            "ceiling": None,
            "cases": [],
            "host": [],
            "failed": [],
            "left_out": [],
        }

    def measure(self) -> Iterator[None]:
        """Measure everything; the report is worth writing after each step."""
        copies = [self._copy()]
        for tensors in HOST_TENSORS:
            self._attempt(f"host time, {tensors} tensors", 0, partial(self._host, tensors))
        for case in cases(model_sets(self.clock.free_bytes(), self.quick)):
            needed = case.bytes_needed(self.clock)
            self._attempt(case.name, needed, partial(self._case, case))
            self._judge(copies)
            yield
        self._judge([*copies, self._copy()])
        yield

    def _attempt(self, name: str, bytes_needed: int, measure: partial[None]) -> None:
        """Measure, or record why not: a run that has come so far shouldn't end at one case."""
        if time.monotonic() > self.end:
            self.report["failed"].append({"case": name, "reason": "no time was left"})
            return
        free = int(self.clock.free_bytes() * MEMORY_SHARE)
        if bytes_needed > free:
            reason = f"it may need {bytes_needed / 1e9:.1f} GB, and {free / 1e9:.1f} are to be had"
            self.report["left_out"].append({"case": name, "reason": reason})
            return
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            measure()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  failed: {reason}", file=sys.stderr, flush=True)
            self.report["failed"].append({"case": name, "reason": reason})

    def _copy(self) -> tuple[int, Timing]:
        """The time of a copy within the device, and its bytes."""
        size = 1 << 20 if self.quick else _COPY_BYTES
        if not self.quick and self.clock.free_bytes() * MEMORY_SHARE < 2 * size:
            size = _LEAST_COPY_BYTES
        generator = torch.Generator(self.clock.device).manual_seed(self.seed)
        source = torch.empty(size // 4, device=self.clock.device).normal_(generator=generator)
        target = torch.empty_like(source)
        copy = {"copy": partial(target.copy_, source)}
        timings = gpu_clock.time_in_turns(self.clock, copy, _ROUNDS, _CASE_SECONDS)
        if not torch.equal(source, target):
            raise AssertionError("the copy is not equal to its source")
        return size, timings["copy"]

    def _judge(self, copies: list[tuple[int, Timing]]) -> None:
        """Set everything in relation to the best copy: the stricter ceiling."""
        rates = [2 * size / timing.median for size, timing in copies]
        self.report["ceiling"] = {
            "buffer_bytes": copies[0][0],
            "bytes_per_second": rates,
            "timings": [asdict(timing) for _, timing in copies],
        }
        for case in self.report["cases"]:
            for contender in case["contenders"]:
                rate = case["bytes_moved"] * case["elements"] / contender["timing"]["median"]
                contender["ceiling_fraction"] = rate / max(rates)

    def _case(self, case: Case) -> None:
        group = case.group(self.clock)
        with torch.no_grad():
            gpu_contenders.check(group, self.seed + 1)
            calls = gpu_contenders.rotating(group)
            rounds, sample = (2, 0.0) if self.quick else (_ROUNDS, gpu_clock.SAMPLE_SECONDS)
            timings = gpu_clock.time_in_turns(self.clock, calls, rounds, _CASE_SECONDS, sample)
        self.report["cases"].append(
            {
                "kind": case.kind,
                "set": case.model.key,
                "title": case.model.title,
                "large": case.model.large,
                "pair": case.pair.name,
                "averages": case.averages,
                "tensors": len(case.model.shapes),
                "elements": case.model.elements,
                "bytes_moved": case.pair.bytes_moved(case.averages),
                "buffer_sets": case.sets(self.clock),
                "launches": group.launches,
                "contenders": _contenders(timings),
            }
        )

    def _host(self, tensors: int) -> None:
        """Ours and foreach on tensors so small that the device has next to nothing to do."""
        wanted = shapes.repeated(tensors, HOST_ELEMENTS)
        group = gpu_contenders.list_group(wanted, FLOAT32, self.clock.device, 1)
        group = Group(group.contenders[:2], group.launches)
        gpu_contenders.check(group, self.seed + 1)
        calls = {contender.name: contender.calls[0] for contender in group.contenders}
        batches = 2 if self.quick else _HOST_BATCHES
        timings, thrown_away = gpu_clock.time_host(self.clock, calls, batches, _HOST_CALLS)
        contenders = _contenders(timings)
        for contender in contenders:
            contender["us_per_tensor"] = contender["timing"]["median"] * 1e6 / tensors
        self.report["host"].append(
            {
                "tensors": tensors,
                "elements_a_tensor": HOST_ELEMENTS,
                "weight": WEIGHT,
                "launches": group.launches,
                "batches_thrown_away": thrown_away,
                "contenders": contenders,
            }
        )


def _contenders(timings: dict[str, Timing]) -> list[dict[str, Any]]:
    ours = next(iter(timings.values())).median
    return [
        {"name": name, "ratio": found.median / ours, "timing": asdict(found)}
        for name, found in timings.items()
    ]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time averaged updates on a GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny tensors: does it run at all?")
    parser.add_argument(
        "--seconds", type=float, default=230, help="start no case after these (default: 230)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tensors' values (default: 0)")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu":
        if not chosen.quick:
            parser.error("--device cpu only rehearses: it takes --quick")
        for file in (chosen.json, chosen.markdown):
            if file is not None and file.name.startswith("gpu_"):
                parser.error(f"{file.name}: what a CPU rehearsed is not written as a GPU's results")
    return chosen


def main() -> None:
    """Measure, print the tables, and write what was asked for."""
    chosen = options()
    if chosen.device == "cuda":
        reason = gpu_device.why_no_gpu()
        if reason is not None:
            print(f"nothing was measured and nothing is written: {reason}", file=sys.stderr)
            sys.exit(gpu_device.NO_GPU)
    # True, and beside the point: what a 16-bit average costs is measured, not what it is worth.
    warnings.filterwarnings("ignore", message="averages are kept in 16 bits")
    if chosen.device == "cpu":
        torch.set_num_threads(1)  # tiny tensors on many threads wait for each other
    clock: Clock = gpu_clock.CudaClock() if chosen.device == "cuda" else gpu_clock.CpuClock()
    run = Run(clock, chosen.seconds, chosen.quick, chosen.seed)
    for _ in run.measure():
        # Written again after each case: a run that is cut short leaves what it had.
        if chosen.json is not None:
            text = json.dumps(run.report, indent=2) + "\n"
            chosen.json.write_text(text, encoding="utf-8")
        if chosen.markdown is not None:
            chosen.markdown.write_text(gpu_report.markdown(run.report), encoding="utf-8")
    print(gpu_report.markdown(run.report))
    sys.exit(1 if run.report["failed"] else 0)


if __name__ == "__main__":
    main()
