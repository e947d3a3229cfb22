"""What gpu_speed.py measured, as Markdown tables, beside what was aimed at.

    python benchmarks/gpu_report.py REPORT.json

Ratios come first: they are what one run can compare. Times stand beside them for orientation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HOST_FIXED, _HOST_A_TENSOR = 10e-6, 6e-9  # seconds of a call's host time: the target
_LARGE_TENSORS = ("1gb", "8gb")
_NOTES = {
    "lists": "**Times as long as `Plan.lerp_`** (one update of prepared lists)",
    "models": "**Times as long as ours** (one `update_parameters` of whole models)",
}


@dataclass(frozen=True)
class Target:
    """What was aimed at and what came out; ``met`` is None where nothing was measured."""

    what: str
    wanted: str
    measured: str
    met: bool | None


# ---- Targets -------------------------------------------------------------------------------------


def targets(report: dict[str, Any]) -> list[Target]:
    """The targets, judged by the worst case each; tiny tensors and a CPU judge none."""
    found = [
        _fraction_target(report),
        _launch_target(report),
        *(_host_target(entry) for entry in report["host"]),
        _ratio_target(report, "float32, large tensors: foreach", 1.05, _on_large_tensors),
        _ratio_target(report, "float32, 1,680 tensors: foreach", 3.0, _on_many_tensors),
        _ratio_target(report, "bfloat16 into float32: the best of torch", 1.8, _best_on_mixed),
        _ratio_target(report, "4 averages in one pass: 4 single updates", 1.25, _four_averages),
    ]
    if report["rehearsal"] or report["quick"]:
        found = [Target(t.what, t.wanted, t.measured, None) for t in found]
    return found


def _fraction_target(report: dict[str, Any]) -> Target:
    cases = [c for c in report["cases"] if c["kind"] == "lists" and c["large"]]
    what, wanted = "models of 1 GB and more: fraction of the copy bandwidth", ">= 0.95"
    if not cases:
        return Target(what, wanted, "not measured", None)
    worst = min(cases, key=_our_fraction)
    measured = f"{_our_fraction(worst):.3f} ({worst['title']}, {worst['pair']})"
    return Target(what, wanted, measured, _our_fraction(worst) >= 0.95)


def _launch_target(report: dict[str, Any]) -> Target:
    launches = [count for case in report["cases"] for count in case["launches"]]
    what = "launches of one update"
    if not launches:
        return Target(what, "1", "not measured", None)
    return Target(what, "1", f"at most {max(launches)}", set(launches) == {1})


def _host_target(entry: dict[str, Any]) -> Target:
    limit = _HOST_FIXED + _HOST_A_TENSOR * entry["tensors"]
    median = entry["contenders"][0]["timing"]["median"]
    what = f"host time of one update of {entry['tensors']:,} tensors"
    return Target(what, f"<= {limit * 1e6:.1f} us", f"{median * 1e6:.1f} us", median <= limit)


def _ratio_target(
    report: dict[str, Any],
    what: str,
    wanted: float,
    ratios: Callable[[dict[str, Any]], Iterable[tuple[float, str]]],
) -> Target:
    """``ratios`` gives (how many times as long as ours, of which case); the smallest one counts."""
    found = [pair for case in report["cases"] for pair in ratios(case)]
    wants = f">= {wanted:.2f} times as long as ours"
    if not found:
        return Target(what, wants, "not measured", None)
    ratio, where = min(found)
    return Target(what, wants, f"{ratio:.2f} ({where})", ratio >= wanted)


def _on_large_tensors(case: dict[str, Any]) -> list[tuple[float, str]]:
    return _foreach_on(case) if case["set"] in _LARGE_TENSORS else []


def _on_many_tensors(case: dict[str, Any]) -> list[tuple[float, str]]:
    return _foreach_on(case) if case["set"] == "sdxl_unet" else []


def _foreach_on(case: dict[str, Any]) -> list[tuple[float, str]]:
    if case["kind"] != "lists" or case["pair"] != "float32":
        return []
    return [(_ratio(case, "torch._foreach_lerp_"), case["title"])]


def _best_on_mixed(case: dict[str, Any]) -> list[tuple[float, str]]:
    if case["kind"] != "lists" or case["pair"] != "bfloat16 into float32":
        return []
    best = min(case["contenders"][1:], key=lambda contender: contender["ratio"])
    return [(best["ratio"], f"{case['title']}; {best['name']}")]


def _four_averages(case: dict[str, Any]) -> list[tuple[float, str]]:
    if case["kind"] != "averages" or case["averages"] != 4:
        return []
    return [(_ratio(case, "single updates"), case["title"])]


def _ratio(case: dict[str, Any], name: str) -> float:
    ratio: float = next(c["ratio"] for c in case["contenders"] if c["name"] == name)
    return ratio


def _our_fraction(case: dict[str, Any]) -> float:
    fraction: float = case["contenders"][0]["ceiling_fraction"]
    return fraction


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    about = report["environment"]
    aside = ("command", "device")
    tiny = ", tiny tensors: no measurement" if report["quick"] and not report["rehearsal"] else ""
    lines = [f"**{about['device']}{tiny}**", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in about.items() if key not in aside))
    lines += ["", f"`{about['command']}`", ""]
    lines += _target_table(report) + _ceiling(report) + _fraction_table(report)
    for kind in ("lists", "models"):
        for pair in dict.fromkeys(c["pair"] for c in report["cases"] if c["kind"] == kind):
            lines += _ratio_table(report, kind, pair)
    lines += _averages_table(report) + _host_table(report)
    for title, key in (("Failed", "failed"), ("Left out", "left_out")):
        if report[key]:
            lines += [f"**{title}**", ""]
            lines += [f"- {entry['case']}: {entry['reason']}" for entry in report[key]] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _target_table(report: dict[str, Any]) -> list[str]:
    words = {True: "met", False: "**not met**", None: "not judged"}
    rows = [[t.what, t.wanted, t.measured, words[t.met]] for t in targets(report)]
    return _table(["target", "wanted", "measured", ""], rows)


def _ceiling(report: dict[str, Any]) -> list[str]:
    ceiling = report["ceiling"]
    if ceiling is None:
        return []
    rates = " and ".join(f"{rate / 1e9:,.0f}" for rate in ceiling["bytes_per_second"])
    return [
        f"Copying {ceiling['buffer_bytes'] / 2**30:.3g} GiB within the device moved {rates} GB/s "
        f"(read + written, medians, before and after all else); the larger one is the ceiling.",
        "",
    ]


def _fraction_table(report: dict[str, Any]) -> list[str]:
    cases = {(c["title"], c["pair"]): c for c in report["cases"] if c["kind"] == "lists"}
    pairs = list(dict.fromkeys(pair for _, pair in cases))
    if not cases:
        return []
    rows = []
    for title in dict.fromkeys(title for title, _ in cases):
        row = [title]
        for case in (cases.get((title, pair)) for pair in pairs):
            row.append("" if case is None else _cell(_our_fraction(case), case["contenders"][0]))
        some = next(c for c in cases.values() if c["title"] == title)
        rows.append([row[0], f"{some['tensors']:,}", f"{some['elements'] / 1e6:,.4g}", *row[1:]])
    floors = {c["pair"]: c["bytes_moved"] for c in cases.values()}
    heads = [f"{pair} ({floors[pair]} bytes a parameter)" for pair in pairs]
    return [
        "**`Plan.lerp_`: fraction of the copy bandwidth** (one update)",
        "",
        *_table(["model", "tensors", "million parameters", *heads], rows),
    ]


def _ratio_table(report: dict[str, Any], kind: str, pair: str) -> list[str]:
    cases = [c for c in report["cases"] if c["kind"] == kind and c["pair"] == pair]
    rows = []
    for i, contender in enumerate(cases[0]["contenders"]):
        found = [case["contenders"][i] for case in cases]
        rows.append([contender["name"], *(_cell(c["ratio"], c) for c in found)])
    return [f"{_NOTES[kind]}, {pair}", "", *_table(["", *(c["title"] for c in cases)], rows)]


def _averages_table(report: dict[str, Any]) -> list[str]:
    cases = [c for c in report["cases"] if c["kind"] == "averages"]
    if not cases:
        return []
    rows = []
    for case in cases:
        ours, theirs = case["contenders"]
        fraction = f"{ours['ceiling_fraction']:.2f}"
        rows.append(
            [str(case["averages"]), _cell(theirs["ratio"], theirs), _duration(ours), fraction]
        )
    return [
        f"**Several averages of one source**, {cases[0]['pair']}, {cases[0]['title']}",
        "",
        *_table(
            ["averages", "single updates: times as long", "one pass", "of the copy bandwidth"], rows
        ),
    ]


def _host_table(report: dict[str, Any]) -> list[str]:
    if not report["host"]:
        return []
    rows = []
    for entry in report["host"]:
        ours, theirs = entry["contenders"]
        each = [f"{c['us_per_tensor'] * 1e3:.1f}" for c in (ours, theirs)]
        cells = [_cell(theirs["ratio"], theirs), _duration(ours), " / ".join(each)]
        rows.append([f"{entry['tensors']:,} x {entry['elements_a_tensor']}", *cells])
    return [
        "**Time of the host alone, the GPU being busy** (one update, float32)",
        "",
        *_table(
            ["tensors", "foreach: times as long", "`Plan.lerp_`", "ns a tensor, ours / foreach"],
            rows,
        ),
    ]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    align = " | ".join(["---"] + ["---:"] * (len(heads) - 1))
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", f"| {align} |", *body, ""]


def _cell(ratio: float, contender: dict[str, Any]) -> str:
    return f"**{ratio:.2f}** ({_duration(contender)})"


def _duration(contender: dict[str, Any]) -> str:
    seconds: float = contender["timing"]["median"]
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def main() -> None:
    """Print the Markdown of a written report."""
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")


if __name__ == "__main__":
    main()
