"""Imports the safetensors package, and reads the header of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def safetensors() -> Any:
    """The package ``safetensors`` with ``safetensors.torch`` imported.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "snapshots and exports are safetensors files, and safetensors can't be imported "
            f"({error}): pip install 'ema_fused[export]'"
        ) from error
    return safetensors


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its size in 8 bytes, then the header in JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    return header
