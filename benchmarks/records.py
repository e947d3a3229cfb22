"""The files in results/: numbers, and the command and versions that gave them.

All are written here: a line for each record, and of a number the digits that mean something.
"""

from __future__ import annotations

import json
from decimal import ROUND_05UP, Context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
# Significant ones: one more than any page shows. Rounded as decimal's ROUND_05UP does it, a number
# that a page rounds once more comes out as if it had been rounded once.
DIGITS = Context(prec=6, rounding=ROUND_05UP)


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes JSON in which a record, which is a dictionary in a list, takes a line.

    A record that has a list of further records breaks off for those. Integers stay exact.
    """
    path.write_text(_text(_shortened(report), "") + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def rounded(values: list[float], digits: int = 5) -> list[float]:
    """Of so many significant digits: a picture shows no more, and the file stays small."""
    return [float(f"{value:.{digits}g}") for value in values]


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    return float(DIGITS.create_decimal(repr(value))) if isinstance(value, float) else value


def _text(value: Any, margin: str) -> str:
    inner = margin + "  "
    if _holds_records(value):
        opening, lines, closing = "[", [_record(item, inner) for item in value], "]"
    elif isinstance(value, dict) and value:
        lines = [f"{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
        opening, closing = "{", "}"
    else:
        return json.dumps(value)
    return f"{opening}\n" + ",\n".join(inner + line for line in lines) + f"\n{margin}{closing}"


def _record(record: dict[str, Any], margin: str) -> str:
    members = []
    for key, item in record.items():
        text = _text(item, margin) if _holds_records(item) else json.dumps(item)
        members.append(f"{json.dumps(key)}: {text}")
    return "{" + ", ".join(members) + "}"


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
