"""Pictures for README and docs: each once for light pages and once for dark ones.

Backgrounds are transparent, letters are text, and nothing depends on the time of day: the same
numbers give the same file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import svg

WIDTH = 8.3  # inches, 830 pixels of a page: a README's column


@dataclass(frozen=True)
class Theme:
    """The colors of one kind of page: ours stands out, the others can be told apart."""

    name: str
    text: str
    grid: str
    ours: str
    others: tuple[str, ...]


# The others are Okabe and Ito's, which color-blind eyes can tell apart; lighter on dark pages.
LIGHT = Theme(
    "light",
    text="#1f2328",
    grid="#d1d9e0",
    ours="#0b57d0",
    others=("#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#6e7781", "#56b4e9"),
)
DARK = Theme(
    "dark",
    text="#e6edf3",
    grid="#3d444d",
    ours="#6cb6ff",
    others=("#ff9a4d", "#3ddc97", "#e8a6cb", "#e3c04a", "#9198a1", "#a5d8f3"),
)


def save(stem: Path, draw: Callable[[Theme], Figure]) -> list[Path]:
    """Writes ``stem``-light.svg and ``stem``-dark.svg; ``draw`` makes the figure of a theme.

    ``draw`` builds a ``matplotlib.figure.Figure`` itself (no pyplot), ``WIDTH`` inches wide.
    """
    written = []
    for theme in (LIGHT, DARK):
        path = stem.with_name(f"{stem.name}-{theme.name}.svg")
        with _style(theme):
            drawn = io.StringIO()
            draw(theme).savefig(drawn, format="svg", transparent=True)
        path.write_text(svg.small(drawn.getvalue()), encoding="utf-8")
        written.append(path)
    return written


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    colors = ("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.color", "ytick.color")
    settings: Any = {
        **dict.fromkeys(colors, theme.text),
        "axes.edgecolor": theme.grid,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "figure.constrained_layout.use": True,
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
        "font.size": 9.5,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text, a line for each
        "svg.hashsalt": "ema_fused",
    }
    with mpl.rc_context(settings):
        yield
