"""Pictures of a run: ratios by model, fractions of the limit, how the cost grows.

    python -m benchmarks.pictures REPORT.json FOLDER

Nothing is measured here: the same report gives the same files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.drawing import WIDTH, Theme, save
from benchmarks.growth import CONTENDERS, FEWEST_POINTS, Point, fitted, growth_points
from ema_fused.bench.contenders import FLOAT32, FOREACH, MIXED, OUR_LISTS
from ema_fused.bench.tables import is_cold

Entry = dict[str, Any]

# What the first picture shows: a name, the kind of case, its dtypes or title, and the contender.
_RATIOS = (
    ("torch._foreach_lerp_, float32", "lists", FLOAT32.name, FOREACH),
    ("cast and foreach, bfloat16 into float32", "lists", MIXED.name, "kept copy"),
    ("a loop of mul_().add_(), float32", "lists", FLOAT32.name, "loop: mul_().add_()"),
    ("torch AveragedModel, mean", "peer", "torch AveragedModel, mean", "original"),
    ("mmengine EMAHook", "peer", "EMAHook, ExponentialMovingAverage", "original"),
    ("timm ModelEmaV2", "peer", "timm ModelEmaV2", "original"),
)
_LIMITS = (
    ("ema_fused, float32", FLOAT32.name, OUR_LISTS),
    ("torch._foreach_lerp_, float32", FLOAT32.name, FOREACH),
    ("ema_fused, bfloat16 into float32", MIXED.name, OUR_LISTS),
    ("cast and foreach, bfloat16 into float32", MIXED.name, "kept copy"),
)
_SHORT = {OUR_LISTS: "ema_fused", FOREACH: "foreach", "loop: lerp_": "a loop of lerp_"}


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the report has into ``folder``; the files, each once light and once dark."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {case["kind"] for case in report["cases"]}
    written = []
    if "lists" in kinds:
        written += save(folder / "ratios", partial(_ratios, report))
        written += save(folder / "limit", partial(_limits, report))
    if len(growth_points(report, OUR_LISTS)) >= FEWEST_POINTS:
        written += save(folder / "growth", partial(_growth, report))
    return written


# ---- Bars ----------------------------------------------------------------------------------------


def _models(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys and titles of the models, most elements first."""
    found = {c["model"]: c for c in report["cases"] if c["kind"] == "lists"}
    by_size = sorted(found.values(), key=lambda case: -int(case["elements"]))
    return [(case["model"], case["model_title"]) for case in by_size]


def _contender(case: Entry, part: str) -> Entry | None:
    return next((c for c in case["contenders"] if part in c["name"]), None)


def find(report: dict[str, Any], kind: str, what: str, model: str, part: str) -> Entry | None:
    """The contender whose name has ``part``, in the case of this kind and model.

    ``what`` is the title of a peer's or apex's case, and the dtypes of any other.
    """
    for case in report["cases"]:
        told_by = case["title"] if kind in ("peer", "apex") else case["dtypes"]
        if (case["kind"], case["model"], told_by) == (kind, model, what):
            return _contender(case, part)
    return None


def _ratios(report: dict[str, Any], theme: Theme) -> Figure:
    models = _models(report)
    figure = Figure((WIDTH, 0.62 * len(models) + 1.5))
    axes = figure.subplots()
    axes.set_xscale("log")
    bars = [
        (name, [find(report, kind, what, key, part) for key, _ in models])
        for name, kind, what, part in _RATIOS
    ]
    _draw_bars(axes, theme.others, bars, lambda c: float(c["ratio"]), start=1.0)
    axes.axvline(1.0, color=theme.ours, linewidth=1.5)
    axes.annotate(
        "ema_fused", (1.0, 1.0), (3, 3), xycoords=("data", "axes fraction"),
        textcoords="offset points", color=theme.ours, fontweight="bold",
    )  # fmt: skip
    _name_rows(axes, [title for _, title in models])
    axes.set_xlabel(
        f"times as long as ema_fused takes (log scale) · {_caches(report)}{_machine(report)}"
    )
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _limits(report: dict[str, Any], theme: Theme) -> Figure:
    models = _models(report)
    figure = Figure((WIDTH, 0.5 * len(models) + 1.5))
    axes = figure.subplots()
    bars = [
        (name, [find(report, "lists", dtypes, key, part) for key, _ in models])
        for name, dtypes, part in _LIMITS
    ]
    first, second = theme.others[:2]
    colors = (theme.ours, first, theme.ours + "99", second)
    _draw_bars(axes, colors, bars, lambda c: float(c["limit_fraction"]), start=0.0)
    axes.axvline(1.0, color=theme.text, linewidth=1.0, linestyle=":")
    _name_rows(axes, [title for _, title in models])
    on_gpu = "capability" in report["environment"]
    limit = "a copy within the device" if on_gpu else "the same bytes in one flat buffer"
    axes.set_xlabel(f"fraction of the speed of {limit} · {_caches(report)}{_machine(report)}")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _draw_bars(
    axes: Axes,
    colors: Sequence[str],
    bars: Sequence[tuple[str, Sequence[Entry | None]]],
    value: Callable[[Entry], float],
    start: float,
) -> None:
    """Groups of horizontal bars, one group a model, from ``start``."""
    height = 0.8 / len(bars)
    for index, (name, found) in enumerate(bars):
        places = [row + (index - (len(bars) - 1) / 2) * height for row in range(len(found))]
        lengths = [0.0 if c is None else value(c) - start for c in found]
        axes.barh(places, lengths, height * 0.9, left=start, color=colors[index], label=name)


def _name_rows(axes: Axes, titles: Sequence[str]) -> None:
    axes.set_yticks(range(len(titles)), [title.replace(", ", "\n", 1) for title in titles])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _machine(report: dict[str, Any]) -> str:
    about = report["environment"]
    threads = "" if "capability" in about else f", {about['threads']} threads"
    return f"{about['device']}{threads}, {about['date']}"


def _caches(report: dict[str, Any]) -> str:
    """How the bars' caches were; a GPU's and older reports say nothing of it."""
    lists = [case for case in report["cases"] if case["kind"] == "lists"]
    return "cold caches · " if is_cold(lists) else ""


# ---- Growth --------------------------------------------------------------------------------------


def _growth(report: dict[str, Any], theme: Theme) -> Figure:
    """Left: by the number of tensors, for some totals; right: by the bytes, for some numbers."""
    figure = Figure((WIDTH, 4.6))
    by_tensors, by_bytes = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(CONTENDERS, (theme.ours, *theme.others), strict=False))
    for name in CONTENDERS:
        points = growth_points(report, name)
        totals = sorted({p.elements for p in points})
        for total in totals[1::3]:
            chosen = [p for p in points if p.elements == total]
            _line(by_tensors, chosen, lambda p: p.tensors, colors[name])
        counts = sorted({p.tensors for p in points})
        for count in counts[::2]:
            chosen = [p for p in points if p.tensors == count]
            _line(by_bytes, chosen, lambda p: p.bytes_moved, colors[name])
        by_tensors.plot([], [], color=colors[name], marker="o", markersize=3, label=_SHORT[name])
    _name_lines(by_tensors, report, "elements", "tensors", theme)
    _name_lines(by_bytes, report, "tensors", "elements", theme)
    by_tensors.set_xlabel("number of tensors")
    by_bytes.set_xlabel("bytes read and written")
    by_tensors.set_ylabel("time of one update (log scale)")
    for axes in (by_tensors, by_bytes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    by_bytes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    figure.legend(loc="outside upper left", ncols=3)
    figure.supxlabel(_constants(report), fontsize=9.5, color=theme.text)
    return figure


def _line(axes: Axes, points: Sequence[Point], x: Callable[[Point], float], color: str) -> None:
    where = [x(point) for point in points]
    seconds = [point.seconds for point in points]
    spread = [[p.seconds - p.lower for p in points], [p.upper - p.seconds for p in points]]
    axes.errorbar(where, seconds, yerr=spread, color=color, marker="o", markersize=3, linewidth=1.2)


def _name_lines(axes: Axes, report: dict[str, Any], held: str, along: str, theme: Theme) -> None:
    """Each bundle of lines is named at the left end of ours."""
    points = growth_points(report, OUR_LISTS)
    values = sorted({getattr(p, held) for p in points})
    for value in values[1::3] if held == "elements" else values[::2]:
        first = min(
            (p for p in points if getattr(p, held) == value), key=lambda p: getattr(p, along)
        )
        x = first.tensors if along == "tensors" else first.bytes_moved
        text = f"{value:,} {held}".replace(",", " ")
        shift = -12 if held == "elements" else 5  # points, to where no other line is
        axes.annotate(
            text, (x, first.seconds), (0, shift), textcoords="offset points",
            color=theme.ours, fontsize=8,
        )  # fmt: skip


def _constants(report: dict[str, Any]) -> str:
    """What the fit says, a contender after the other."""
    parts = []
    for name in CONTENDERS[:2]:
        fit = fitted(report, name)
        parts.append(f"{_SHORT[name]}: {fit.a_tensor * 1e9:.3g} ns a tensor + bytes at {fit.speed}")
    return f"{'; '.join(parts)}\n{_machine(report)}"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if value >= size * 0.999:
            return f"{value / size:g} {unit}"
    return f"{value:g} s"


def _bytes(value: float) -> str:
    return f"{_count(value)}B"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} "


def main() -> None:
    """Draw a written report again."""
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for path in draw(report, Path(sys.argv[2])):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
