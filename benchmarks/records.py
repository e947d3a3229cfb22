"""Result files that a page quotes: numbers, and the command and versions that gave them."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import ema_fused

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def environment(module: str) -> dict[str, str | int]:
    """The command, as it is typed in the root of the repository, and the versions it ran with."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ema_fused": ema_fused.__version__,
        "backend": ", ".join(ema_fused.Plan([torch.zeros(1)], [torch.ones(1)]).backends),
        "threads": torch.get_num_threads(),
    }


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
