"""Averages at the end of the interpreter, when the functions that they call may be gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes


@pytest.mark.slow
def test_nothing_is_printed_when_models_go_after_the_modules_globals() -> None:
    done = processes.run(Path(__file__).with_name("ending_run.py"))
    assert done.stderr == ""
    assert done.stdout == "PowerFunctionEMA is None"
