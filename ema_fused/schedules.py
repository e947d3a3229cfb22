"""Momentum as a function of the step: pure functions, one formula each.

Momentum is the weight of the new value:
``averaged = (1 - momentum) * averaged + momentum * source``. ``step`` counts the updates made
before this one, so the first average after the initial copy is made at step 1. Bind the other
arguments and give the function to a model::

    ExponentialMovingAverage(model, momentum=partial(annealing, momentum=0.001, gamma=200))
"""

from __future__ import annotations

import math

from ema_fused.checks import check_fraction, check_positive


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step is {step!r}; a count of updates, 0 or more, is expected")


def constant(step: int, *, momentum: float = 0.0002) -> float:
    """``momentum`` at every step, as mmengine's ``ExponentialMovingAverage``.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], or ``step`` negative.
    """
    _check_step(step)
    check_fraction("momentum", momentum)
    return momentum


def annealing(step: int, *, momentum: float = 0.0002, gamma: float = 100) -> float:
    """``max(momentum, gamma / (gamma + step))``, as mmengine's ``MomentumAnnealingEMA``.

    Starts near 1 and falls to ``momentum``, which it reaches at
    ``step = gamma * (1 / momentum - 1)``.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], ``gamma`` not above 0, or ``step`` negative.
    """
    _check_step(step)
    check_fraction("momentum", momentum)
    check_positive("gamma", gamma)
    return max(momentum, gamma / (gamma + step))


def exponential(step: int, *, momentum: float = 0.0002, gamma: float = 2000) -> float:
    """``(1 - momentum) * exp(-(1 + step) / gamma) + momentum``, as mmdet's ``ExpMomentumEMA``.

    The schedule of YOLOX (Ge et al. 2021, arXiv 2107.08430): starts near 1 and decays to
    ``momentum`` with the time constant ``gamma``, in steps.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], ``gamma`` not above 0, or ``step`` negative.
    """
    _check_step(step)
    check_fraction("momentum", momentum)
    check_positive("gamma", gamma)
    return (1 - momentum) * math.exp(-float(1 + step) / gamma) + momentum


def linear_warmup(step: int, *, momentum: float = 0.0002, warm_up: float = 100) -> float:
    """``min(momentum, (1 + step) / (warm_up + step))``, as mmdet 2's ``LinearMomentumEMAHook``.

    Momentum grows from ``1 / warm_up`` until it meets ``momentum``. Below ``1 / warm_up``, as with
    the defaults of the original, ``momentum`` is the smaller one from the start and the schedule is
    constant.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], ``warm_up`` below 1, or ``step`` negative.
    """
    _check_step(step)
    check_fraction("momentum", momentum)
    if not 1 <= warm_up < math.inf:
        raise ValueError(
            f"warm_up is {warm_up!r}; a finite number of steps, 1 or more, is expected"
        )
    return min(momentum, (1 + step) / (warm_up + step))


def cosine(step: int, *, start: float = 0.004, end: float = 0.0, total: int) -> float:
    """``end - (end - start) * (cos(pi * step / total) + 1) / 2``, as MMPretrain's ``CosineEMA``.

    The schedule of BYOL (Grill et al. 2020, arXiv 2006.07733), from ``start`` at step 0 to ``end``
    at step ``total``, and ``end`` from there on.

    Raises:
        ValueError: ``start`` or ``end`` is outside [0, 1], ``total`` not above 0, or ``step``
            negative.
    """
    _check_step(step)
    check_fraction("start", start)
    check_fraction("end", end)
    check_positive("total", total)
    return half_cosine(math.pi * min(step, total) / total, start, end)


def half_cosine(phase: float, start: float, end: float) -> float:
    """From ``start`` at phase 0 to ``end`` at phase pi, along half a period of the cosine."""
    return end - (end - start) * ((math.cos(phase) + 1) / 2)
