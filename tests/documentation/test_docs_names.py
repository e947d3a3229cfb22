"""Every test that a page of docs/ names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
TESTS = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def named(page: str) -> list[tuple[str, str]]:
    """(file, test or "") of every mention; a name with * stands for many files."""
    return re.findall(r"(?<![\w/])(?:tests/(?:\w+/)*)?(test_[\w*]+\.py)(?:::(test_\w+))?", page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_tests_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, test in named(text):
        if "*" in file:
            assert list((ROOT / "tests").rglob(file)), file
            continue
        assert file in TESTS, f"{page.name} names {file}, which isn't there"
        if test:
            assert test in functions(TESTS[file]), f"{page.name} names {file}::{test}"
    for file in re.findall(r"csrc/tests/[\w.]+\.\w+", text):
        assert (ROOT / file).exists(), file


def test_the_page_on_reliability_names_many() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert len(named(page)) > 50
    assert sum(bool(test) for _, test in named(page)) > 25
    # A backtick around something that looks like a test is always seen.
    assert all(named(code) for code in re.findall(r"`(test_[^`]*)`", page))


def test_every_section_of_the_page_on_silent_faults_names_a_thread_and_tests() -> None:
    page = (ROOT / "docs" / "silent_faults.md").read_text(encoding="utf-8")
    faults = re.split(r"^### ", page.partition("\n## What drop-ins")[0], flags=re.M)[1:]
    assert len(faults) == 12
    for fault in faults:
        seen_in = re.search(r"^- Seen in:.*?(?=^- )", fault, re.M | re.S)
        assert seen_in is not None, fault
        assert "](https://github.com/" in seen_in[0] or "no thread" in seen_in[0], fault
        assert any(test for _, test in named(fault)), fault


def test_a_name_that_is_not_there_is_found() -> None:
    assert named("`test_x.py::test_y`, tests/test_z.py") == [
        ("test_x.py", "test_y"),
        ("test_z.py", ""),
    ]
    assert "test_named_tests_exist" in functions(Path(__file__))
    assert "test_nothing" not in functions(Path(__file__))
