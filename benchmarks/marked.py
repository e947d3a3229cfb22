"""Pages with parts that a program writes, between two comments that name it."""

from __future__ import annotations

from pathlib import Path


def between_markers(page: str, program: str, text: str) -> str:
    """``page`` with ``text`` in the place of what stood between the markers of ``program``.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = (f"<!-- {program}: {word} -->" for word in ("begin", "end"))
    head, found_begin, rest = page.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page has no line {begin} with a line {end} after it; add both")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def write(page: Path, program: str, text: str) -> None:
    """Writes ``text`` into a page."""
    old = page.read_text(encoding="utf-8")
    page.write_text(between_markers(old, program, text), encoding="utf-8")
