"""How the cost of an update grows: with the number of tensors, and with their bytes.

Two constants describe it: seconds a tensor, and seconds a byte that comes from memory. They are
fitted to the medians of one run by least squares of the relative error, with two more that leave
them undisturbed: for what a call costs at all, and for a byte that comes from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from ema_fused.bench.contenders import (
    FLOAT32,
    FOREACH,
    OUR_LISTS,
    WEIGHT,
    Buffers,
    Contender,
    Group,
    check,
    foreach,
    lerp_loop,
    plan_of,
)
from ema_fused.bench.measuring import Case
from ema_fused.bench.shapes import Shapes, find
from ema_fused.bench.tables import Table
from ema_fused.bench.timing import Clock

TENSORS = (10, 100, 1_000, 10_000, 100_000)
ELEMENTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
FEWEST_POINTS = 5  # for four constants
# Tensors that hold no more are taken to lie in a cache: that of a CPU's cores, or a GPU's L2.
_CACHE_BYTES = 32 << 20
_PIECE = 1 << 24  # elements that are checked at once
CONTENDERS = (OUR_LISTS, FOREACH, "loop: lerp_")


def growth_cases(
    clock: Clock, tensors: Sequence[int] = TENSORS, elements: Sequence[int] = ELEMENTS
) -> Iterator[Case]:
    """Lists of ``tensors`` equal tensors that hold ``elements`` together, float32."""
    for total in elements:
        for count in tensors:
            if count <= total:
                shapes = find(f"{count}x{total // count}")
                needed = FLOAT32.bytes_held() * shapes.elements
                make = partial(_made, shapes, clock.device)
                title = f"{total:,} elements in {count:,} tensors"
                yield Case("growth", "torch", title, shapes, FLOAT32, needed, make)


def _made(shapes: Shapes, device: torch.device) -> Group:
    """Contenders on views of one buffer each.

    A hundred thousand allocations would take longer than all updates, and so would a check that
    goes from tensor to tensor: it looks at long pieces of the two buffers.
    """
    source = torch.linspace(-1.0, 1.0, shapes.elements, device=device)
    averaged = torch.zeros_like(source)
    length = shapes.shapes[0][0]
    views = Buffers(list(averaged.split(length)), list(source.split(length)), [])
    pieces = list(averaged.split(_PIECE)), list(source.split(_PIECE))
    flat = [Buffers(*pieces, [WEIGHT] * len(pieces[0]))]
    plan = plan_of(views.averaged, views.source)
    calls = (partial(plan.lerp_, WEIGHT), partial(foreach, views), partial(lerp_loop, views))
    contenders = [
        Contender(name, [call], flat, exact=call is not calls[-1])
        for name, call in zip(CONTENDERS, calls, strict=True)
    ]
    bytes_moved = shapes.elements * FLOAT32.bytes_moved()
    limit = partial(averaged.lerp_, source, WEIGHT)
    return Group(contenders, bytes_moved, partial(check, contenders), [plan.launches], limit)


# ---- The fit -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """``seconds = a_call + a_tensor * tensors + a_byte * bytes``, all in seconds.

    ``a_cached_byte`` stands for ``a_byte`` where all tensors together fit a cache.

    Attributes:
        error: the median over the points of how far the fit is off, relatively.
        points: how many were fitted.
    """

    a_call: float
    a_tensor: float
    a_byte: float
    a_cached_byte: float
    error: float
    points: int

    @property
    def speed(self) -> str:
        """What a byte from memory costs, as GB/s."""
        return _speed(self.a_byte)


def _speed(a_byte: float) -> str:
    return f"{1e-9 / a_byte:.3g} GB/s" if a_byte else "too few to tell"


def fitted(report: dict[str, Any], contender: str) -> Fit:
    """The constants of a contender in a report's growth cases.

    Raises:
        ValueError: where fewer than :data:`FEWEST_POINTS` were measured.
    """
    points = growth_points(report, contender)
    if len(points) < FEWEST_POINTS:
        raise ValueError(f"{len(points)} points of growth are too few for four constants")
    seconds = np.array([point.seconds for point in points])
    terms = np.array([_terms(point) for point in points])
    # Each equation is divided by its measured time, so that all points count alike; columns are
    # scaled to their largest entry, so that the solver's tolerances suit them.
    weighted = terms / seconds[:, None]
    scale = np.maximum(weighted.max(axis=0), 1e-300)
    solution, _ = nnls(weighted / scale, np.ones(len(points)))
    constants = solution / scale
    errors = np.abs(terms @ constants / seconds - 1)
    call, tensor, byte, cached = (float(constant) for constant in constants)
    return Fit(call, tensor, byte, cached, float(np.median(errors)), len(points))


def _terms(point: Point) -> list[float]:
    moved, held = point.bytes_moved, FLOAT32.bytes_held() * point.elements
    in_memory, in_cache = (0, moved) if held <= _CACHE_BYTES else (moved, 0)
    return [1.0, point.tensors, in_memory, in_cache]


def table(report: dict[str, Any]) -> list[Table]:
    """The constants, a contender a row; nothing where too little was measured."""
    if len(growth_points(report, OUR_LISTS)) < FEWEST_POINTS:
        return []
    rows = []
    for name in CONTENDERS:
        fit = fitted(report, name)
        speeds = _speed(fit.a_byte), _speed(fit.a_cached_byte)
        call = f"{fit.a_call * 1e6:.2g} us"
        rows.append([name, f"{fit.a_tensor * 1e9:.3g} ns", *speeds, call, f"{fit.error:.0%}"])
    first, *_, last = (case for case in report["cases"] if case["kind"] == "growth")
    return [
        Table(
            "How the cost grows",
            [
                "",
                "a tensor",
                "bytes from memory",
                "bytes from a cache",
                "a call",
                "typical error of the fit",
            ],
            rows,
            f"Fitted to {len(growth_points(report, OUR_LISTS))} lists, from {first['title']} to "
            f"{last['title']}.",
        )
    ]


@dataclass(frozen=True)
class Point:
    """One measured list; seconds, with the quartiles, of one update."""

    tensors: int
    elements: int
    bytes_moved: int
    seconds: float
    lower: float
    upper: float


def growth_points(report: dict[str, Any], contender: str) -> list[Point]:
    """What was measured of a contender, by elements and then by tensors."""
    return [
        Point(
            case["tensors"],
            case["elements"],
            case["bytes_moved"],
            found["timing"]["median"],
            found["timing"]["lower_quartile"],
            found["timing"]["upper_quartile"],
        )
        for case in report["cases"]
        if case["kind"] == "growth"
        for found in case["contenders"]
        if found["name"] == contender
    ]
