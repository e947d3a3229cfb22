"""Profiles of power-function averages, and how to combine them (Karras et al. 2023).

arXiv 2312.02696. Time is counted from 0, in steps or training samples. An average at time t weights
the model of time tau by its profile, which integrates to 1 over [0, t]::

    p(tau) = (gamma + 1) * tau ** gamma / t ** (gamma + 1)

``sigma_rel`` is its standard deviation divided by t. The profile of a weighted sum of averages is
the weighted sum of their profiles. So an average that wasn't kept is approximated by the weighted
sum of kept ones with the nearest profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_fused.engine.elementary import Number, expm1, log1p

# The width at gamma = 0, where all values have equal weight.
LARGEST_SIGMA_REL = math.sqrt(1 / 12)

# Eigenvalues below it are dropped. They belong to directions in which the kept profiles hardly
# differ: weights along them would be so large that the magnified float32 rounding of the snapshots
# would cost more than the better profile gains.
_CUT = 1e-10


class Profile(NamedTuple):
    """The profile of one average: its exponent, and the time of its last update."""

    gamma: float
    time: float


class Combination(NamedTuple):
    """Weights of the kept profiles, which sum to 1, and the error of the combined profile.

    ``error`` is the L2 distance between the combined and the wanted profile, divided by the norm of
    the wanted one.
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
    For g above 0 the polynomial is convex; it is negative at 0 and positive at ``1 / sigma_rel``.
    So Newton's method, started at ``1 / sigma_rel``, descends to the only positive root.

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
            return gamma  # as exact as rounding allows
        gamma = lower


def momentum_between(gamma: float, before: Number, after: Number) -> Number:
    """The weight of the new value in an update from time ``before`` to time ``after``.

    ``1 - beta`` with ``beta = (before / after) ** (gamma + 1)``, which is ``(1 - dt / t) ** (gamma
    + 1)``. It is exactly the integral of the profile between the two times, so no error
    accumulates.
    """
    if not isinstance(before, Tensor) and before == 0:
        return 1.0
    return -expm1((gamma + 1) * log1p((before - after) / after))


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """The weighted sum of kept profiles that is nearest to the wanted one, by least squares.

    Inner products are known in closed form. For exponents a and b, and times s <= t::

        integral over [0, s] of  (a + 1) tau^a / s^(a + 1) * (b + 1) tau^b / t^(b + 1)
            =  (a + 1) (b + 1) / (a + b + 1) * (s / t)^b / t

    because the product is a multiple of ``tau^(a + b)``, and beyond s the first profile is 0.

    The weights are constrained to a sum of 1, as a profile integrates to 1. So parameters that
    never changed in training come out exactly, and the others without an error proportional to
    their size.
    """
    gammas = torch.tensor([profile.gamma for profile in kept], dtype=torch.float64)
    times = torch.tensor([profile.time for profile in kept], dtype=torch.float64)
    products = _inner(gammas[:, None], times[:, None], gammas, times)
    gamma, time = torch.tensor(wanted, dtype=torch.float64)
    with_wanted = _inner(gammas, times, gamma, time)
    # Normalised to unit length: an early profile is much higher than a late one.
    lengths = products.diagonal().sqrt()
    matrix = products / (lengths[:, None] * lengths)
    right = with_wanted / lengths
    # Weights with sum 1 form a hyperplane: ``point`` is on it, ``basis`` spans its directions.
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
    """Inner products (integrals of products) of profiles, elementwise."""
    late = torch.maximum(time_a, time_b)
    gamma_of_late = torch.where(time_a <= time_b, gamma_b, gamma_a)
    share = (torch.minimum(time_a, time_b) / late) ** gamma_of_late
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * share / late


def density(profile: Profile, times: Tensor) -> Tensor:
    """The values of the profile at ``times``; 0 after its own time."""
    heights = (profile.gamma + 1) * (times / profile.time) ** profile.gamma / profile.time
    return torch.where(times <= profile.time, heights, 0.0)
