"""Result files that a page quotes: numbers, and the command and versions that gave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes JSON with an indent, but every list of numbers on one line."""
    path.write_text(_text(report, "") + "\n", encoding="utf-8")


def _text(value: Any, margin: str) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = margin + "  "
    lines = [f"{inner}{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def rounded(values: list[float], digits: int = 5) -> list[float]:
    """Of so many significant digits: a picture shows no more, and the file stays small."""
    return [float(f"{value:.{digits}g}") for value in values]
