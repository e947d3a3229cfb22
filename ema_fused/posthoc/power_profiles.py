"""Power-function averages: their profiles, and how one is made of others (Karras et al. 2023).

arXiv 2312.02696. A run is counted in time, from 0: steps or training samples. An average of time t
weighs what the model was at time tau by its profile, which integrates to 1 over [0, t]::

    p(tau) = (gamma + 1) * tau ** gamma / t ** (gamma + 1)

``sigma_rel`` is its standard deviation divided by t. A weighted sum of averages has the weighted
sum of their profiles, so an average that nobody kept is approximated by the sum of kept ones whose
profile is nearest to its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_fused.engine.elementary import Number, expm1, log1p

# At gamma = 0, where all values weigh the same.
LARGEST_SIGMA_REL = math.sqrt(1 / 12)

# Directions in which many kept profiles hardly differ are left out: weights along them would be so
# large that they magnify the float32 rounding of the snapshots above what they gain in the profile.
_CUT = 1e-10


class Profile(NamedTuple):
    """The profile of one average: its exponent, and the time of its last update."""

    gamma: float
    time: float


class Combination(NamedTuple):
    """Weights, one a kept profile, that sum to 1, and how far their sum is from what was wanted.

    ``error`` is the distance of the two profiles divided by the norm of the wanted one (in L2).
    """

    weights: list[float]
    error: float


def check_sigma_rel(sigma_rel: float) -> None:
    """Raises ValueError unless a profile of this width exists."""
    if not 0.0 < sigma_rel < LARGEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel is {sigma_rel!r}; a number in (0, 0.2887) is expected: the width of the "
            f"averaging profile as a fraction of the run"
        )


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile with this relative width.

    The largest root of ``g**3 + 7 * g**2 + (16 - v) * g + (12 - v)`` with ``v = sigma_rel**-2``.
    To the right of 0 the polynomial is convex, negative at 0 and positive at ``1 / sigma_rel``, so
    Newton's method comes down from there to its only positive root.

    Raises:
        ValueError: ``sigma_rel`` is outside (0, 0.2887).
    """
    check_sigma_rel(sigma_rel)
    v = sigma_rel**-2
    gamma = 1 / sigma_rel
    while True:
        value = ((gamma + 7) * gamma + (16 - v)) * gamma + (12 - v)
        lower = gamma - value / ((3 * gamma + 14) * gamma + (16 - v))
        if not 0.0 <= lower < gamma:
            return gamma  # as near as rounding lets it come
        gamma = lower


def momentum_between(gamma: float, before: Number, after: Number) -> Number:
    """The weight of the new value in an update that takes the average from one time to another.

    ``1 - beta`` with ``beta = (before / after) ** (gamma + 1)``, which is ``(1 - dt / t) ** (gamma
    + 1)``. Exactly the profile's share of the time between the two, so no error adds up.
    """
    if not isinstance(before, Tensor) and before == 0:
        return 1.0
    return -expm1((gamma + 1) * log1p((before - after) / after))


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """The sum of kept profiles nearest to the wanted one, by least squares.

    Inner products are known in closed form. For exponents a and b, and times s <= t::

        integral over [0, s] of  (a + 1) tau^a / s^(a + 1) * (b + 1) tau^b / t^(b + 1)
            =  (a + 1) (b + 1) / (a + b + 1) * (s / t)^b / t

    because the product is a multiple of ``tau^(a + b)``, and beyond s the first profile is 0.

    The weights are held to a sum of 1, as a profile's integral is: weights that the training never
    changed come out as they are, and the others without an error in proportion to their size.
    """
    gammas = torch.tensor([profile.gamma for profile in kept], dtype=torch.float64)
    times = torch.tensor([profile.time for profile in kept], dtype=torch.float64)
    products = _inner(gammas[:, None], times[:, None], gammas, times)
    gamma, time = torch.tensor(wanted, dtype=torch.float64)
    with_wanted = _inner(gammas, times, gamma, time)
    # Of unit length each: an early profile is much taller than a late one.
    lengths = products.diagonal().sqrt()
    matrix = products / (lengths[:, None] * lengths)
    right = with_wanted / lengths
    # The sum of weights is 1 on a plane: one point of it, and an orthonormal basis of the rest.
    normal = 1 / lengths
    point = normal / normal.dot(normal)
    basis = torch.linalg.qr(normal[:, None], mode="complete").Q[:, 1:]
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    vectors = vectors[:, values > _CUT * len(kept)]
    values = values[values > _CUT * len(kept)]
    along = vectors @ ((vectors.T @ (basis.T @ (right - matrix @ point))) / values)
    found = point + basis @ along
    norm = _inner(gamma, time, gamma, time)
    squared = norm - 2 * right.dot(found) + found.dot(matrix @ found)
    error = math.sqrt(max(0.0, (squared / norm).item()))
    return Combination((found / lengths).tolist(), error)


def _inner(gamma_a: Tensor, time_a: Tensor, gamma_b: Tensor, time_b: Tensor) -> Tensor:
    """Integrals of products of profiles, elementwise."""
    late = torch.maximum(time_a, time_b)
    gamma_of_late = torch.where(time_a <= time_b, gamma_b, gamma_a)
    share = (torch.minimum(time_a, time_b) / late) ** gamma_of_late
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * share / late


def density(profile: Profile, times: Tensor) -> Tensor:
    """The profile at ``times``: 0 after its own time."""
    heights = (profile.gamma + 1) * (times / profile.time) ** profile.gamma / profile.time
    return torch.where(times <= profile.time, heights, 0.0)
