"""How the cost of an update grows: with the number of tensors, and with their bytes.

Two constants describe it, seconds a tensor and seconds a byte, and a third one what a call costs at
all. They are fitted to the medians of one run by least squares of the relative error.
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
from ema_fused.bench.measuring import Case, limit_bytes
from ema_fused.bench.shapes import Shapes, find
from ema_fused.bench.tables import Table
from ema_fused.bench.timing import Clock

TENSORS = (10, 100, 1_000, 10_000, 100_000)
ELEMENTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
FEWEST_POINTS = 4  # for three constants
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
                needed = 8 * shapes.elements + limit_bytes(12 * shapes.elements)
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
    return Group(contenders, bytes_moved, partial(check, contenders), [plan.launches])


# ---- The fit -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """``seconds = a_call + a_tensor * tensors + a_byte * bytes``, all in seconds.

    Attributes:
        error: the median over the points of how far the fit is off, relatively.
        points: how many were fitted.
    """

    a_call: float
    a_tensor: float
    a_byte: float
    error: float
    points: int

    @property
    def speed(self) -> str:
        """What a byte costs, as GB/s."""
        return f"{1e-9 / self.a_byte:.3g} GB/s" if self.a_byte else "too fast to tell"


def fitted(report: dict[str, Any], contender: str) -> Fit:
    """The constants of a contender in a report's growth cases.

    Raises:
        ValueError: where fewer than :data:`FEWEST_POINTS` were measured.
    """
    points = growth_points(report, contender)
    if len(points) < FEWEST_POINTS:
        raise ValueError(f"{len(points)} points of growth are too few for three constants")
    seconds = np.array([point.seconds for point in points])
    terms = np.array([[1.0, point.tensors, point.bytes_moved] for point in points])
    # Each equation is divided by its measured time, so that all points count alike; columns are
    # scaled to their largest entry, so that the solver's tolerances suit them.
    weighted = terms / seconds[:, None]
    scale = weighted.max(axis=0)
    solution, _ = nnls(weighted / scale, np.ones(len(points)))
    constants = solution / scale
    errors = np.abs(terms @ constants / seconds - 1)
    call, tensor, byte = (float(constant) for constant in constants)
    return Fit(call, tensor, byte, float(np.median(errors)), len(points))


def table(report: dict[str, Any]) -> list[Table]:
    """The constants, a contender a row; nothing where too little was measured."""
    if len(growth_points(report, OUR_LISTS)) < FEWEST_POINTS:
        return []
    rows = []
    for name in CONTENDERS:
        fit = fitted(report, name)
        constants = f"{fit.a_call * 1e6:.2g} us", f"{fit.a_tensor * 1e9:.3g} ns", fit.speed
        rows.append([name, *constants, f"{fit.error:.0%}"])
    first, *_, last = (case for case in report["cases"] if case["kind"] == "growth")
    return [
        Table(
            "How the cost grows",
            ["", "a call", "a tensor", "its bytes", "typical error of the fit"],
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
