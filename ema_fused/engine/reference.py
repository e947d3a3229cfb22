"""What an update computes, in float64 NumPy: the reference for tests and for readers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def average(averaged: ArrayLike, source: ArrayLike, weight: float) -> NDArray[np.float64]:
    """``(1 - weight) * averaged + weight * source`` in float64, whatever the inputs' dtypes.

    Every arithmetic of a Plan ("lerp", "axpby", "delta", "products") equals this up to rounding.
    """
    a = np.asarray(averaged, dtype=np.float64)
    s = np.asarray(source, dtype=np.float64)
    return (1.0 - weight) * a + weight * s


def squared_distance(averaged: ArrayLike, source: ArrayLike) -> float:
    """The sum of ``|source - averaged|**2`` over all elements, in float64; complex tensors too."""
    a, s = np.asarray(averaged), np.asarray(source)
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    difference = s.astype(wide) - a.astype(wide)
    return float(np.sum(np.abs(difference) ** 2))


def tolerance(epsilon: float, *terms: Any) -> NDArray[np.float64]:
    """The largest error against the reference, in arithmetic with machine epsilon ``epsilon``.

    An update rounds at most four times. Each rounding is off by at most half an epsilon, relative
    to the sum of the magnitudes of ``terms`` (the averaged tensor, the source, their weighted
    difference).
    """
    total = sum(np.abs(np.asarray(term, dtype=np.float64)) for term in terms)
    return np.asarray(2.0 * epsilon * total + np.finfo(np.float64).tiny)
