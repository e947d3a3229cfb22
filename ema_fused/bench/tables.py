"""Results as tables: in Markdown, or drawn by rich on a terminal if it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ema_fused.bench.contenders import OURS
from ema_fused.bench.measuring import Report
from ema_fused.bench.terminal import console

Entry = dict[str, Any]

_BUSY = 0.5  # load per core, before the benchmark begins

_TITLES = {
    "lists": "Times as long as `Plan.lerp_` takes: prepared lists",
    "several": "Times as long as one pass takes: several averages of one source",
    "models": "Times as long as ours takes: `update_parameters` of whole models",
    "compiled": "Times as long as `Plan.lerp_` takes: prepared lists, beside torch.compile",
    "sharded": "Times as long as ours takes: DTensors in one process",
    "apex": "Times as long as ours takes: apex",
    "host": "Times as long as `Plan.lerp_` takes of the host alone, the device being busy",
}
_FIGURES = {"mean": "mean", "median": "median", "percentile_99": "99th percentile"}


@dataclass(frozen=True)
class Table:
    """A table whose first column has names; ``note`` explains the cells."""

    title: str
    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


# ---- From a report -------------------------------------------------------------------------------


def tables(report: Report) -> list[Table]:
    """All tables of a report; where caches were cold and hot, the cold table comes first."""
    cases = report["cases"]
    found = []
    for kind in _TITLES:
        for dtypes in _distinct(cases, "dtypes", kind):
            chosen = [c for c in cases if c["kind"] == kind and c["dtypes"] == dtypes]
            title = f"{_TITLES[kind]}, {dtypes}"
            found += [_ratios(*each, title) for each in _by_caches(chosen, report)]
    for peer in _distinct(cases, "peer", "peer"):
        chosen = [c for c in cases if c["kind"] == "peer" and c["peer"] == peer]
        found += [_peers(*each, peer) for each in _by_caches(chosen, report)]
    lists = [case for case in cases if case["kind"] == "lists"]
    found += [_limits(*each) for each in _by_caches(lists, report)[:1]]
    found += _busy([case for case in cases if case["kind"] == "busy"])
    for title, key in (("Failed", "failed"), ("Left out", "left_out")):
        if report[key]:
            rows = [[entry["case"], entry["reason"]] for entry in report[key]]
            found.append(Table(title, ["what", "why"], rows))
    return found


def is_cold(cases: Sequence[Entry]) -> bool:
    """Whether the first figures of these cases are those of cold caches."""
    return any(case.get("condition") == "cold" for case in cases)


def _by_caches(cases: Sequence[Entry], report: Report) -> list[tuple[Sequence[Entry], str, str]]:
    """The cases, with what to add to a title and to a note: once a table."""
    if not cases:
        return []
    if not is_cold(cases):
        return [(cases, "", "")]
    touched = report["touched"]
    note = (
        f" Between two samples {touched['bytes'] / 2**20:,.4g} MiB of memory and "
        f"{touched['objects']:,} small Python objects are touched; a sample is one call."
    )
    hot = " Calls of one contender follow each other."
    return [(cases, ", cold caches", note), (_hot(cases), ", warm caches", hot)]


def _hot(cases: Sequence[Entry]) -> list[Entry]:
    """The cases with the figures of warm caches in the first place."""
    return [
        {
            **case,
            "contenders": [
                {**c, "timing": c["hot_timing"], "ratio": c["hot_ratio"]}
                for c in case["contenders"]
            ],
        }
        for case in cases
    ]


def _distinct(cases: Sequence[Entry], key: str, kind: str) -> list[str]:
    return list(dict.fromkeys(case[key] for case in cases if case["kind"] == kind))


def _ratios(chosen: Sequence[Entry], caches: str, more: str, title: str) -> Table:
    """A table with a row per contender and a column per model."""
    names = list(dict.fromkeys(c["name"] for case in chosen for c in case["contenders"]))
    rows = []
    for name in names:
        cells = [_cell_of(case, name) for case in chosen]
        rows.append([name, *cells])
    heads = ["", *(case["model_title"] for case in chosen)]
    note = "Median over ours (the median, and half the distance of the quartiles)."
    return Table(f"{title}{caches}", heads, rows, note + more)


def _cell_of(case: Entry, name: str) -> str:
    found = [c for c in case["contenders"] if c["name"] == name]
    return cell(found[0]) if found else ""


def _peers(chosen: Sequence[Entry], caches: str, more: str, peer: str) -> Table:
    """A table with a row per original and a column per model."""
    models = list(dict.fromkeys(case["model_title"] for case in chosen))
    rows = []
    for title in dict.fromkeys(case["title"] for case in chosen):
        by_model = {case["model_title"]: case for case in chosen if case["title"] == title}
        rows.append([title, *(original_cell(by_model.get(model)) for model in models)])
    note = "The original's median over ours (the original's, ours)."
    title = f"Times as long as ours takes: {peer}{caches}"
    return Table(title, ["", *models], rows, note + more)


def original_cell(case: Entry | None) -> str:
    """The time of a drop-in's original divided by ours."""
    if case is None:
        return ""
    ours, original = case["contenders"]
    return f"{ratio(original)} ({duration(original)}, {duration(ours)})"


def _limits(chosen: Sequence[Entry], caches: str, more: str) -> Table:
    """A table of our lists with a row per model and a column per pair of dtypes."""
    dtypes = list(dict.fromkeys(case["dtypes"] for case in chosen))
    rows = []
    # A model with several dtypes has a row for each.
    for key in dict.fromkeys((c["model_title"], c["tensors"], c["elements"]) for c in chosen):
        title, tensors, elements = key
        of_model = {
            c["dtypes"]: c for c in chosen if (c["model_title"], c["tensors"], c["elements"]) == key
        }
        fractions = [_fraction(of_model.get(name)) for name in dtypes]
        rows.append([title, f"{tensors:,}", f"{elements / 1e6:,.4g}", *fractions])
    return Table(
        f"Fraction of the limit that `{OURS} Plan.lerp_` reaches{caches}",
        ["", "tensors", "million elements", *dtypes],
        rows,
        "The limit: the same bytes in one flat buffer (CPU), a copy within the device (GPU)."
        + more,
    )


def _fraction(case: Entry | None) -> str:
    fraction = case and case["contenders"][0]["limit_fraction"]
    return "" if fraction is None else f"{fraction:.2f}"


def _busy(cases: Sequence[Entry]) -> list[Table]:
    """A table with a row per list, of ours beside foreach."""
    if not cases:
        return []
    rows = [[case["model_title"], *_busy_cells(case)] for case in cases]
    count = cases[0]["spinning"]
    note = (
        f"Ours over foreach (ours, foreach), of single calls while {count} other processes "
        "compute, one for each core."
    )
    return [
        Table("All cores taken: `Plan.lerp_` over foreach", ["", *_FIGURES.values()], rows, note)
    ]


def _busy_cells(case: Entry) -> Iterator[str]:
    for key in _FIGURES:
        ours, foreach = (
            seconds(c["timing"]["median"] if key == "median" else c[key])
            for c in case["contenders"]
        )
        yield f"{short(case['ours_over_foreach'][key])} ({ours}, {foreach})"


def cell(contender: Entry) -> str:
    """A contender's ratio, its median and its spread."""
    timing = contender["timing"]
    spread = (timing["upper_quartile"] - timing["lower_quartile"]) / 2 / timing["median"]
    return f"{ratio(contender)} ({duration(contender)} ±{spread:.0%})"


def ratio(contender: Entry) -> str:
    """A contender's ratio, as :func:`short` writes it."""
    return short(contender["ratio"])


def short(number: float) -> str:
    """Two decimal places; for small numbers two significant digits."""
    return f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.2g}"


def duration(contender: Entry) -> str:
    """A median with its unit."""
    return seconds(contender["timing"]["median"])


def seconds(number: float) -> str:
    """Three digits with their unit."""
    if abs(number) >= 1:
        return f"{number:.3g} s"
    return f"{number * 1e3:.3g} ms" if abs(number) >= 1e-3 else f"{number * 1e6:.3g} us"


# ---- As text -------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """The table in Markdown, under its title."""
    align = " | ".join(["---"] + ["---:"] * (len(table.heads) - 1))
    lines = [f"**{table.title}**", "", f"| {' | '.join(table.heads)} |", f"| {align} |"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*lines, "", *([table.note, ""] if table.note else [])])


def about(report: Report) -> str:
    """The machine, the versions and the command of a report."""
    environment = dict(report["environment"])
    command = environment.pop("command")
    text = ", ".join(f"{key} {value}" for key, value in environment.items())
    text += f"\n\n`{command}`\n"
    load, cores = float(environment.get("load", 0)), int(environment["cores"])
    if load > _BUSY * cores:
        text += (
            f"\n**Other programs kept the machine busy (load {load:g} on {cores} cores when it "
            "began): these ratios mean little.**\n"
        )
    return text


def show(found: Sequence[Table], write: Callable[[str], object]) -> None:
    """Prints tables: through rich on a terminal that has it, else as Markdown to ``write``."""
    terminal = console()
    if terminal is None:
        for table in found:
            write(markdown(table) + "\n")
        return
    from rich.table import Table as RichTable

    for table in found:
        drawn = RichTable(title=table.title, caption=table.note, title_justify="left")
        for index, head in enumerate(table.heads):
            drawn.add_column(head, justify="right" if index else "left")
        for row in table.rows:
            drawn.add_row(*row)
        terminal.print(drawn)
