"""Results as tables: in Markdown, or drawn by rich on a terminal if it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    "host": "Times as long as `Plan.lerp_` takes of the host alone, the device being busy",
}


@dataclass(frozen=True)
class Table:
    """A table whose first column has names; ``note`` explains the cells."""

    title: str
    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


# ---- From a report -------------------------------------------------------------------------------


def tables(report: Report) -> list[Table]:
    """All tables of a report."""
    cases = report["cases"]
    found = []
    for kind in _TITLES:
        for dtypes in _distinct(cases, "dtypes", kind):
            found.append(_ratios(cases, kind, dtypes))
    for peer in _distinct(cases, "peer", "peer"):
        found.append(_peers(cases, peer))
    if any(case["kind"] == "lists" for case in cases):
        found.append(_limits(cases))
    for title, key in (("Failed", "failed"), ("Left out", "left_out")):
        if report[key]:
            rows = [[entry["case"], entry["reason"]] for entry in report[key]]
            found.append(Table(title, ["what", "why"], rows))
    return found


def _distinct(cases: Sequence[Entry], key: str, kind: str) -> list[str]:
    return list(dict.fromkeys(case[key] for case in cases if case["kind"] == kind))


def _ratios(cases: Sequence[Entry], kind: str, dtypes: str) -> Table:
    """A table with a row per contender and a column per model."""
    chosen = [case for case in cases if case["kind"] == kind and case["dtypes"] == dtypes]
    names = list(dict.fromkeys(c["name"] for case in chosen for c in case["contenders"]))
    rows = []
    for name in names:
        cells = [_cell_of(case, name) for case in chosen]
        rows.append([name, *cells])
    heads = ["", *(case["model_title"] for case in chosen)]
    note = "Median over ours (the median, and half the distance of the quartiles)."
    return Table(f"{_TITLES[kind]}, {dtypes}", heads, rows, note)


def _cell_of(case: Entry, name: str) -> str:
    found = [c for c in case["contenders"] if c["name"] == name]
    return cell(found[0]) if found else ""


def _peers(cases: Sequence[Entry], peer: str) -> Table:
    """A table with a row per original and a column per model."""
    chosen = [case for case in cases if case["kind"] == "peer" and case["peer"] == peer]
    models = list(dict.fromkeys(case["model_title"] for case in chosen))
    rows = []
    for title in dict.fromkeys(case["title"] for case in chosen):
        by_model = {case["model_title"]: case for case in chosen if case["title"] == title}
        rows.append([title, *(original_cell(by_model.get(model)) for model in models)])
    note = "The original's median over ours (the original's, ours)."
    return Table(f"Times as long as ours takes: {peer}", ["", *models], rows, note)


def original_cell(case: Entry | None) -> str:
    """The time of a drop-in's original divided by ours."""
    if case is None:
        return ""
    ours, original = case["contenders"]
    return f"{ratio(original)} ({duration(original)}, {duration(ours)})"


def _limits(cases: Sequence[Entry]) -> Table:
    """A table of our lists with a row per model and a column per pair of dtypes."""
    chosen = [case for case in cases if case["kind"] == "lists"]
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
        f"Fraction of the limit that `{OURS} Plan.lerp_` reaches",
        ["", "tensors", "million elements", *dtypes],
        rows,
        "The limit: the same bytes in one flat buffer (CPU), a copy within the device (GPU).",
    )


def _fraction(case: Entry | None) -> str:
    fraction = case and case["contenders"][0]["limit_fraction"]
    return "" if fraction is None else f"{fraction:.2f}"


def cell(contender: Entry) -> str:
    """A contender's ratio, its median and its spread."""
    timing = contender["timing"]
    spread = (timing["upper_quartile"] - timing["lower_quartile"]) / 2 / timing["median"]
    return f"{ratio(contender)} ({duration(contender)} ±{spread:.0%})"


def ratio(contender: Entry) -> str:
    """Two decimal places; for small ratios two significant digits."""
    found: float = contender["ratio"]
    return f"{found:.2f}" if found >= 0.1 else f"{found:.2g}"


def duration(contender: Entry) -> str:
    """A median with its unit."""
    seconds: float = contender["timing"]["median"]
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


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
