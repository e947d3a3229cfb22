"""Weights of checkpoints in a list, the oldest first: ``weights_of(schedule, n)``.

Each schedule with its source; ``x`` goes from 0, the first checkpoint, to 1, one after the last:

* ``mean``: equal weights. SWA (arXiv 1803.05407), model soups (arXiv 2203.05482), PMA (arXiv
  2505.12082).
* ``ema:DECAY``: what an exponential moving average holds after an update from each checkpoint in
  turn, the first having been copied; timm's and torch's.
* ``linear``, ``minus-sqrt`` and functions: WSM (arXiv 2507.17634), as Megatron-LM's
  ``tools/checkpoint/weighted_merge.py`` computes it. Had the run decayed its learning rate over
  these checkpoints by ``rate(x)``, relative to its peak, the change between two of them would have
  counted that much. So a checkpoint counts by how much the rate falls after it:
  ``rate(i / n) - rate((i + 1) / n)``; the first gets the rest, so that the sum is 1. ``linear`` is
  ``1 - x``, which makes all weights equal; ``minus-sqrt`` is ``1 - sqrt(x)``.
* ``power:SIGMA``: what a power-function average (EDM2, arXiv 2312.02696) of this relative width
  holds after an update from each checkpoint at its step, the first having been copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from ema_fused.posthoc.power_profiles import gamma_of, momentum_between

Schedule = str | Callable[[float], float]


def _linear(x: float) -> float:
    return 1.0 - x


def _minus_sqrt(x: float) -> float:
    return 1.0 - math.sqrt(x)


_RATES: dict[str, Callable[[float], float]] = {"linear": _linear, "minus-sqrt": _minus_sqrt}
_EXPECTED = "mean, linear, minus-sqrt, ema:DECAY or power:SIGMA"


def weights_of(schedule: Schedule, n: int, steps: Sequence[int] | None = None) -> list[float]:
    """The weights of ``n`` checkpoints, from the oldest to the latest; they sum to 1.

    Args:
        schedule: ``"mean"``, ``"linear"``, ``"minus-sqrt"``, ``"ema:DECAY"`` (``"ema:0.9"``),
            ``"power:SIGMA"`` (``"power:0.1"``); or the remaining learning rate as a function of the
            position in [0, 1), relative to its value at 0.
        n: how many.
        steps: of the training, one per checkpoint, rising; only ``power`` needs them.

    Raises:
        ValueError: there is no such schedule, its number is out of range, or ``n`` is below 1.
        TypeError: ``schedule`` is neither a string nor a function.
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 checkpoint is expected")
    if callable(schedule):
        return _by_rate(schedule, n)
    if not isinstance(schedule, str):
        raise TypeError(f"schedule is {schedule!r}; {_EXPECTED} is expected, or a function")
    name, colon, number = schedule.partition(":")
    if schedule == "mean":
        return [1.0 / n] * n
    if schedule in _RATES:
        return _by_rate(_RATES[schedule], n)
    if colon and name == "ema":
        return _by_decay(_number(schedule, number), n)
    if colon and name == "power":
        return _by_width(_number(schedule, number), n, steps)
    raise ValueError(f"schedule is {schedule!r}; {_EXPECTED} is expected")


def _number(schedule: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(
            f"schedule is {schedule!r}; a number is expected after the colon"
        ) from error


def _by_rate(rate: Callable[[float], float], n: int) -> list[float]:
    rates = [float(rate(position / n)) for position in range(n)] + [0.0]
    if not all(math.isfinite(value) for value in rates):
        raise ValueError(f"the schedule's rates are {rates[:-1]}; finite numbers are expected")
    weights = [before - after for before, after in pairwise(rates)]
    weights[0] = 1.0 - math.fsum(weights[1:])
    return weights


def _by_decay(decay: float, n: int) -> list[float]:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"the decay of the schedule is {decay!r}; a number in [0, 1] is expected")
    return [decay ** (n - 1)] + [(1.0 - decay) * decay ** (n - 1 - i) for i in range(1, n)]


def _by_width(sigma_rel: float, n: int, steps: Sequence[int] | None) -> list[float]:
    gamma = gamma_of(sigma_rel)
    if steps is None:
        raise ValueError(
            "schedule 'power' needs the steps of the checkpoints, and not all of their names or "
            "contents tell one; name them as step-1000, or pass steps"
        )
    if len(steps) != n:
        raise ValueError(f"steps has {len(steps)} items for {n} checkpoints; one each is expected")
    if steps[0] <= 0 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"steps are {list(steps)}; rising numbers above 0 are expected")
    weights = [1.0]
    for before, after in pairwise(steps):
        new = momentum_between(gamma, float(before), float(after))
        weights = [weight * (1.0 - new) for weight in weights] + [new]
    return weights


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum.

    Raises:
        ValueError: a weight isn't finite, or they sum to 0.
    """
    check_finite(weights)
    total = math.fsum(weights)
    if abs(total) < 1e-12 * math.fsum(map(abs, weights)) or total == 0:
        raise ValueError(
            f"the weights {list(weights)} sum to {total:g} and can't be divided by it; pass "
            f"normalise=False (--no-normalise) to take them as they are"
        )
    return [weight / total for weight in weights]


def check_finite(weights: Sequence[float]) -> None:
    """Raises ValueError unless all weights are finite."""
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights are {list(weights)}; finite numbers are expected")
