"""The parameter shapes to measure: of real networks, and lists of equal vectors.

The shapes of networks are in ``shapes/*.json``, each file with its source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Shape = tuple[int, ...]

_FOLDER = Path(__file__).parent / "shapes"
_REPEATED = re.compile(r"(?P<count>\d+)x(?P<elements>\d+)")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model's parameters, in their order.

    Attributes:
        key: the name on the command line.
        title: the name in tables, which says what was left out or scaled.
        shapes: one shape per parameter.
        source: where the shapes come from.
    """

    key: str
    title: str
    shapes: list[Shape]
    source: str

    @property
    def elements(self) -> int:
        """How many elements the tensors hold together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def capped(self, longest: int) -> Shapes:
        """The same with every dimension at most ``longest``, for quick trial runs."""
        shapes = [tuple(min(length, longest) for length in shape) for shape in self.shapes]
        return Shapes(self.key, f"{self.title}, tiny", shapes, self.source)


def networks() -> list[str]:
    """The keys of the networks that have a file."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def find(key: str) -> Shapes:
    """The shapes of ``key``: a network, ``network*3`` (three times over), or ``1000x16``.

    Raises:
        ValueError: for any other key.
    """
    repeated = _REPEATED.fullmatch(key)
    if repeated is not None:
        count, elements = int(repeated["count"]), int(repeated["elements"])
        title = f"{count:,} x {elements:,}".replace(",", " ")
        return Shapes(key, title, [(elements,)] * count, "made up")
    name, star, times = key.partition("*")
    if name not in networks() or (star and not times.isdigit()):
        raise ValueError(
            f"{key!r} are no shapes: known are {', '.join(networks())}, one of these with *3 for "
            "three times over, and COUNTxELEMENTS as in 1000x16"
        )
    found = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    shapes = [tuple(shape) for shape, count in found["shapes"] for _ in range(count)]
    if "divided" in found:
        shapes = _divided(shapes, found["divided"]["by"], found["divided"]["from"])
    title = found["title"] + (f", {times} times" if star else "")
    return Shapes(key, title, shapes * int(times or 1), found["source"])


def _divided(shapes: Sequence[Shape], by: int, at_least: int) -> list[Shape]:
    """The shapes with every dimension >= ``at_least`` divided by ``by``: a narrower network."""
    return [
        tuple(length // by if length >= at_least else length for length in shape)
        for shape in shapes
    ]
