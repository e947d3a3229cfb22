"""The types that users' own checkers see: mypy of a file of uses."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy isn't installed")

USES = Path(__file__).with_name("typed_uses.py")
ROOT = USES.parents[2]
# torch itself isn't read, which takes most of the time of a check, and is no part of it.
CONFIGURATION = """
    [mypy]
    warn_unused_ignores = true
    disallow_untyped_calls = false
    explicit_package_bases = true
    follow_imports = silent
    [mypy-torch.*]
    follow_imports = skip
"""


@pytest.mark.slow
def test_every_kind_takes_what_is_documented_and_nothing_else(tmp_path: Path) -> None:
    configuration = tmp_path / "mypy.ini"
    configuration.write_text(textwrap.dedent(CONFIGURATION))
    command = [sys.executable, "-m", "mypy", "--config-file", str(configuration)]
    found = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), str(USES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stdout + found.stderr
