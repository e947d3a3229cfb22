"""What is aimed at on a GPU, beside what a run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ema_fused.bench.contenders import FLOAT32, FOREACH, MIXED, OURS
from ema_fused.bench.measuring import Report
from ema_fused.bench.tables import Table

Entry = dict[str, Any]

_LARGE_BYTES = 10**9  # of averages: an update is nothing but moving memory
_LARGE_LISTS = ("16x16777216", "128x16777216")
_HOST_FIXED, _HOST_A_TENSOR = 10e-6, 6e-9  # seconds of a call's host time


@dataclass(frozen=True)
class Target:
    """What was aimed at and what came out; ``met`` is None where nothing was measured."""

    what: str
    wanted: str
    measured: str
    met: bool | None


def table(report: Report) -> list[Table]:
    """The targets as a table."""
    words = {True: "met", False: "NOT MET", None: "not judged"}
    rows = [[t.what, t.wanted, t.measured, words[t.met]] for t in targets(report)]
    return [Table("Targets", ["target", "wanted", "measured", ""], rows)]


def targets(report: Report) -> list[Target]:
    """The targets, judged by the worst case each; tiny tensors judge none."""
    cases = report["cases"]
    hosts = [case for case in cases if case["kind"] == "host"]
    found = [
        _fraction_target(cases),
        _launch_target(cases),
        *(_host_target(entry) for entry in hosts),
        _ratio_target(cases, "float32, large tensors: foreach", 1.05, _on_large_lists),
        _ratio_target(cases, "float32, 1,680 tensors: foreach", 3.0, _on_many_tensors),
        _ratio_target(cases, "bfloat16 into float32: the best of torch", 1.8, _best_on_mixed),
        _ratio_target(cases, "4 averages in one pass: 4 single updates", 1.25, _four_averages),
    ]
    if report["smoke"]:
        found = [Target(t.what, t.wanted, t.measured, None) for t in found]
    return found


def _fraction_target(cases: list[Entry]) -> Target:
    large = [c for c in cases if c["kind"] == "lists" and 4 * c["elements"] >= _LARGE_BYTES]
    what, wanted = "models of 1 GB and more: fraction of the copy bandwidth", ">= 0.95"
    if not large:
        return Target(what, wanted, "not measured", None)
    worst = min(large, key=_our_fraction)
    fraction = _our_fraction(worst)
    measured = f"{fraction:.3f} ({worst['model_title']}, {worst['dtypes']})"
    return Target(what, wanted, measured, fraction >= 0.95)


def _our_fraction(case: Entry) -> float:
    fraction: float = case["contenders"][0]["limit_fraction"]
    return fraction


def _launch_target(cases: list[Entry]) -> Target:
    launches = [count for case in cases for count in case["launches"]]
    what = "launches of one update"
    if not launches:
        return Target(what, "1", "not measured", None)
    return Target(what, "1", f"at most {max(launches)}", set(launches) == {1})


def _host_target(entry: Entry) -> Target:
    limit = _HOST_FIXED + _HOST_A_TENSOR * entry["tensors"]
    ours = entry["contenders"][0]
    cold, hot = ours["timing"]["median"], ours["hot_timing"]["median"]
    what = f"host time of one update of {entry['tensors']:,} tensors, cold caches"
    measured = f"{cold * 1e6:.1f} us ({hot * 1e6:.1f} us with warm ones)"
    return Target(what, f"<= {limit * 1e6:.1f} us", measured, cold <= limit)


def _ratio_target(
    cases: list[Entry],
    what: str,
    wanted: float,
    ratios: Callable[[Entry], Iterable[tuple[float, str]]],
) -> Target:
    """``ratios`` gives (how many times as long as ours, of which case); the smallest one counts."""
    found = [pair for case in cases for pair in ratios(case)]
    wants = f">= {wanted:.2f} times as long as ours"
    if not found:
        return Target(what, wants, "not measured", None)
    ratio, where = min(found)
    return Target(what, wants, f"{ratio:.2f} ({where})", ratio >= wanted)


def _on_large_lists(case: Entry) -> list[tuple[float, str]]:
    return _foreach_on(case) if case["model"] in _LARGE_LISTS else []


def _on_many_tensors(case: Entry) -> list[tuple[float, str]]:
    return _foreach_on(case) if case["model"] == "sdxl_unet" else []


def _foreach_on(case: Entry) -> list[tuple[float, str]]:
    if case["kind"] != "lists" or case["dtypes"] != FLOAT32.name:
        return []
    return [(_ratio(case, FOREACH), case["model_title"])]


def _best_on_mixed(case: Entry) -> list[tuple[float, str]]:
    if case["kind"] != "lists" or case["dtypes"] != MIXED.name:
        return []
    theirs = [c for c in case["contenders"] if OURS not in c["name"]]
    best = min(theirs, key=lambda contender: float(contender["ratio"]))
    return [(best["ratio"], f"{case['model_title']}; {best['name']}")]


def _four_averages(case: Entry) -> list[tuple[float, str]]:
    if case["kind"] != "several":
        return []
    return [(_ratio(case, f"4 {OURS} Plans"), case["model_title"])]


def _ratio(case: Entry, name: str) -> float:
    ratio: float = next(c["ratio"] for c in case["contenders"] if c["name"] == name)
    return ratio
