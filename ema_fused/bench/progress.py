"""How far a run has come, on stderr: a bar on a terminal that has rich, else a line a step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def tracked(items: Iterable[tuple[str, Item]], total: int) -> Iterator[Item]:
    """Yields the items, telling the name of the one that is worked on."""
    try:
        from rich.console import Console
        from rich.progress import Progress, TimeElapsedColumn
    except ImportError:
        yield from _lines(items, total)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(items, total)
        return
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        for name, item in items:
            bar.update(task, description=name)
            yield item
            bar.advance(task)


def _lines(items: Iterable[tuple[str, Item]], total: int) -> Iterator[Item]:
    for done, (name, item) in enumerate(items):
        sys.stderr.write(f"[{done + 1}/{total}] {name}\n")
        sys.stderr.flush()
        yield item
