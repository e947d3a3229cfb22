"""rich's console, if there is a terminal to draw on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console | None:
    """rich's console on stdout or stderr; None without rich, or if that isn't a terminal."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    found = Console(stderr=stderr)
    return found if found.is_terminal else None
