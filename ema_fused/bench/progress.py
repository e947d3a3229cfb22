"""Progress of a run on stderr: a bar if stderr is a terminal and rich is installed, else lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from ema_fused.bench.measuring import Case
from ema_fused.bench.terminal import console


def tracked(cases: Sequence[Case]) -> Iterator[Case]:
    """Yields the cases, and shows the name of the current one."""
    terminal = console(stderr=True)
    if terminal is None:
        for place, case in enumerate(cases, 1):
            sys.stderr.write(f"[{place}/{len(cases)}] {case.name}\n")
            sys.stderr.flush()
            yield case
        return
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=case.name)
            yield case
            bar.advance(task)
