"""The share of an average in a sharded step: the program runs, and its numbers are medians."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import marked, sharded_step
from benchmarks.sharded_step import LISTS, LOOP, OURS, WALKED, Result
from tests import ROOT, processes

SHORT = ("--layers", "1", "--rounds", "1", "--repeats", "2")


@pytest.mark.slow
def test_the_program_writes_its_table_into_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- sharded_step.py: begin -->\n<!-- sharded_step.py: end -->\nbehind"
    )
    done = processes.run("-m", "benchmarks.sharded_step", *SHORT, "--write", str(page))
    written = page.read_text()
    assert written == (f"before\n{marked_part(done.stdout.strip())}\nbehind"), (
        "what is printed is what is written"
    )
    assert "17 tensors, " in written and "2 processes of one thread" in written
    rows = re.findall(r"(?m)^\| (.+?) \| (\S+) % \| (.+?) \|$", written)
    assert [name for name, _, _ in rows] == [OURS, WALKED, LISTS, LOOP]
    assert rows[0][2] == "1"
    for _, share, times in rows[1:]:
        assert 0 < float(share) < 100
        assert re.fullmatch(r"\S+ \(\S+ to \S+\)", times)


def marked_part(text: str) -> str:
    return f"<!-- sharded_step.py: begin -->\n\n{text}\n\n<!-- sharded_step.py: end -->"


def test_the_page_has_a_table_of_the_program() -> None:
    page = (ROOT / "docs" / "large_models.md").read_text(encoding="utf-8")
    assert marked.between_markers(page, sharded_step.PROGRAM, "") != page
    for name in (OURS, WALKED, LISTS, LOOP):
        assert f"| {name} | " in page


def test_the_slowest_process_counts_and_medians_are_of_each_repetition() -> None:
    def samples(*updates: float) -> dict[str, list[tuple[float, float]]]:
        return {OURS: [(1.0, update) for update in updates], LOOP: [(3.0, 10.0)] * 3}

    first: list[Any] = [samples(0.1, 0.1, 0.9), samples(0.2, 0.2, 0.2)]
    second: list[Any] = [samples(0.1, 0.3, 0.1), samples(0.1, 0.1, 0.1)]
    result = sharded_step._result([first, second], 17, 1000)
    assert result == Result([2.0, 2.0], {OURS: [0.3, 0.2], LOOP: [10.0, 10.0]}, 17, 1000)
    assert result.update(OURS) == 0.25
    assert result.share(OURS) == 0.25 / 2.25
    assert result.ratios(LOOP) == [10.0 / 0.3, 50.0]
    assert result.ratios(OURS) == [1.0, 1.0]
