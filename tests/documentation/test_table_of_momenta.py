"""The table "I think in ..., write ..." of docs/which_average.md is Python, and says the truth."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from ema_fused import schedules
from tests import ROOT

NAMES = {**vars(schedules), "partial": functools.partial, "loader": range(100)}


def rows() -> dict[str, Any]:
    """What each row's momentum is, by what the reader thinks in."""
    page = (ROOT / "docs" / "which_average.md").read_text(encoding="utf-8")
    table = page.split("### I think in")[1].split("\n\n")[1]
    found = re.findall(r"^\| (.+) \| `(.+)` \|$", table, re.MULTILINE)
    found = [(thought, line) for thought, line in found if thought != "I think in"]
    assert len(found) == len(table.splitlines()) - 2
    return {thought: eval(line, NAMES) for thought, line in found}


def test_every_row_is_a_momentum() -> None:
    for thought, momentum in rows().items():
        assert 0 < (momentum(200) if callable(momentum) else momentum) <= 0.5, thought


@pytest.mark.parametrize(
    ("thought", "half_life"),
    [
        ("a half-life of 1,000 steps", 1000),
        ("... of 256,000 samples", 1000),
        ("... of 2 billion tokens", 500),
        ("... of half an epoch", 50),
        ("5 % of a run of 90 epochs", 450),
    ],
)
def test_half_lives_are_as_long_as_the_table_says(thought: str, half_life: int) -> None:
    assert (1 - rows()[thought]) ** half_life == pytest.approx(0.5)


def test_functions_of_the_step_do_what_the_table_says() -> None:
    table = rows()
    for thought, fraction in (("5 % of the run so far (torchtitan)", 0.05), ("1 % ", 0.01)):
        momentum = next(value for key, value in table.items() if key.startswith(thought))
        assert (1 - momentum(9_999)) ** (fraction * 10_000) == pytest.approx(0.5)
    copies = table["a decay of 0 for the first 100 updates, then 0.999"]
    assert [copies(99), copies(100)] == [1.0, 0.001]
    assert (
        table["a cosine over 300 epochs"](30_000) == 0.0 < table["a cosine over 300 epochs"](29_000)
    )
