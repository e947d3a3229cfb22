"""Ours and the original at work: what the benchmark asks of either."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ema_fused.bench.contenders import FLOAT32, module_of

# Of the source tree, whose tests load originals that have no place in the environment.
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Side:
    """An average at work on a network of its own.

    Attributes:
        calls: one update, in this order.
        trained: what an optimizer would change.
        state: all that is held, by name.
        next_step: called before each update of the check.
    """

    calls: tuple[Callable[[], object], ...]
    trained: list[Tensor]
    state: Callable[[], dict[str, Tensor]]
    next_step: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Match:
    """One of ours and what it stands in for, each made from the values of a network.

    Attributes:
        title: what is done, for tables.
        ours: ours at work.
        original: the original at work.
        exact: both round alike: equal to the bit.
        bytes_moved: of an element, by one update, at the least.
    """

    title: str
    ours: Callable[[list[Tensor]], Side]
    original: Callable[[list[Tensor]], Side]
    exact: bool = True
    bytes_moved: int = FLOAT32.bytes_moved()


def match(title: str, side: Callable[..., Side], ours: Any, original: Any, **rest: Any) -> Match:
    """A match whose sides differ in their module only, the first argument of ``side``."""
    return Match(title, partial(side, ours), partial(side, original), **rest)


def network(values: list[Tensor]) -> nn.Module:
    """A module of its own with these values."""
    return module_of([tensor.clone() for tensor in values])


def tests_importable() -> None:
    """Lets modules of the tests be imported."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
