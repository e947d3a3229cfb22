"""Momentum as a function of the step: pure functions, one formula each.

Momentum is the weight of the new value:
``averaged = (1 - momentum) * averaged + momentum * source``. ``step`` counts the updates made
before this one, so the first average after the initial copy is made at step 1. Bind the other
arguments and pass the function to a model::

    ExponentialMovingAverage(model, momentum=partial(annealing, momentum=0.001, gamma=200))

Durations (half-lives, time constants, lengths of runs) are in steps; :func:`in_steps` makes steps
of samples, tokens and epochs.

``step`` may also be a 0-dim float64 tensor. The momentum is then a tensor too, computed on the same
device without synchronising (``capturable`` averages need that).

Other packages use the weight of the average instead, the decay: ``momentum = 1 - decay``. Their
``step`` often includes this update, counting from 1; each function says what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ema_fused.engine.checks import (
    as_integer,
    check_fraction,
    check_integer,
    check_not_negative,
    check_positive,
)
from ema_fused.engine.elementary import (
    Number,
    at_least,
    at_most,
    cos,
    exp,
    expm1,
    one_until,
    raised,
)
from ema_fused.posthoc.power_profiles import gamma_of, momentum_between


def _check_step(step: float | Tensor) -> None:
    if not isinstance(step, Tensor) and step < 0:
        raise ValueError(f"step is {step!r}; a count of updates, 0 or more, is expected")


def constant(step: float | Tensor, *, momentum: float = 0.0002) -> float:
    """``momentum`` at every step, as mmengine's ``ExponentialMovingAverage``.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], or ``step`` negative.
    """
    _check_step(step)
    return check_fraction("momentum", momentum)


def annealing(step: Number, *, momentum: float = 0.0002, gamma: float = 100) -> Number:
    """``max(momentum, gamma / (gamma + step))``, as mmengine's ``MomentumAnnealingEMA``.

    Starts near 1 and falls to ``momentum``, which it reaches at
    ``step = gamma * (1 / momentum - 1)``.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], ``gamma`` not above 0, or ``step`` negative.
    """
    _check_step(step)
    momentum = check_fraction("momentum", momentum)
    gamma = check_positive("gamma", gamma)
    return at_least(gamma / (gamma + step), momentum)


def exponential(step: Number, *, momentum: float = 0.0002, gamma: float = 2000) -> Number:
    """``(1 - momentum) * exp(-(1 + step) / gamma) + momentum``, as mmdet's ``ExpMomentumEMA``.

    The schedule of YOLOX (Ge et al. 2021, arXiv 2107.08430): starts near 1 and decays to
    ``momentum`` with the time constant ``gamma``, in steps.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], ``gamma`` not above 0, or ``step`` negative.
    """
    _check_step(step)
    momentum = check_fraction("momentum", momentum)
    gamma = check_positive("gamma", gamma)
    return (1 - momentum) * exp(-(1 + step) / gamma) + momentum


def inverse_power(
    step: Number,
    *,
    power: float = 0.5,
    lag: float = 10,
    multiplier: float = 1.0,
    least: float = 0.0,
    before: int = 0,
) -> Number:
    """``max((lag + multiplier * (step + before)) ** -power, least)``, as TRL's ``BEMACallback``.

    Block and Zhang 2025, arXiv 2508.00180: a power law of the step, with an initial lag.

    Args:
        step: updates before this one; TRL's ``step`` counts those of the training, which is
            ``before`` more if the average begins later.
        power: 0 or more; at 0 it is always 1.
        lag: what the steps start from, 0 or more.
        multiplier: of the steps, 0 or more.
        least: it doesn't fall below this number.
        before: steps made before the average began.

    Raises:
        ValueError: an argument is out of its range, or all of ``lag``, ``step`` and ``before`` 0.
    """
    _check_step(step)
    power = check_not_negative("power", power)
    lag = check_not_negative("lag", lag)
    multiplier = check_not_negative("multiplier", multiplier)
    least = check_fraction("least", least)
    reached = lag + multiplier * (step + before)
    if not isinstance(reached, Tensor) and reached == 0 and power > 0:
        raise ValueError(
            f"lag + multiplier * step is 0 at step {step}, which has no inverse power; pass a lag "
            f"above 0"
        )
    return at_least(raised(reached, -power), least)


def linear_warmup(step: Number, *, momentum: float = 0.0002, warm_up: float = 100) -> Number:
    """``min(momentum, (1 + step) / (warm_up + step))``, as mmdet 2's ``LinearMomentumEMAHook``.

    Momentum grows from ``1 / warm_up`` until it reaches ``momentum``. If ``momentum`` is below
    ``1 / warm_up``, as with the defaults of the original, it is the minimum from the start and the
    schedule is constant. So it is with a ``warm_up`` of 1 or less: the ratio is never below 1 then.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], or ``warm_up`` or ``step`` negative.
    """
    _check_step(step)
    momentum = check_fraction("momentum", momentum)
    warm_up = check_not_negative("warm_up", warm_up)
    # Nothing is divided by 0 at step 0; the ratio is 1 or more there as it is.
    return at_most((1 + step) / at_least(warm_up + step, 1), momentum)


def cosine(step: Number, *, start: float = 0.004, end: float = 0.0, total: float) -> Number:
    """``end - (end - start) * (cos(pi * step / total) + 1) / 2``, as MMPretrain's ``CosineEMA``.

    The schedule of BYOL (Grill et al. 2020, arXiv 2006.07733), from ``start`` at step 0 to ``end``
    at step ``total``, and ``end`` from there on.

    Raises:
        ValueError: ``start`` or ``end`` is outside [0, 1], ``total`` not above 0, or ``step``
            negative.
    """
    _check_step(step)
    start = check_fraction("start", start)
    end = check_fraction("end", end)
    total = check_positive("total", total)
    return half_cosine(math.pi * at_most(step, total) / total, start, end)


def half_cosine(phase: Number, start: float, end: float) -> Number:
    """``end - (end - start) * (cos(phase) + 1) / 2``: ``start`` at phase 0, ``end`` at pi."""
    return end - (end - start) * ((cos(phase) + 1) / 2)


def mean(step: Number) -> Number:
    """``1 / (step + 1)``: the mean of all values so far, as torch's ``get_swa_avg_fn``.

    Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407). torch's ``num_averaged``
    is ``step``.

    Raises:
        ValueError: ``step`` is negative.
    """
    _check_step(step)
    return 1 / (step + 1)


def warmup_power(
    step: Number,
    *,
    momentum: float = 0.0001,
    largest: float = 1.0,
    gamma: float = 1.0,
    power: float = 2 / 3,
    after: int = 0,
) -> Number:
    """``(1 + s / gamma) ** -power`` clamped to [momentum, largest], with ``s = step - after - 1``.

    The momentum is 1 (a copy) until ``s`` is above 0. This is the warm-up of timm's ``ModelEmaV3``
    (``use_warmup=True``), of diffusers' ``EMAModel`` (``use_ema_warmup=True``) and of ema-pytorch's
    ``EMA``, written there as the decay ``1 - (1 + s / inv_gamma) ** -power``. Pass the step that
    they pass to ``get_decay``: in timm and diffusers it includes this update.

    Args:
        step: as the original counts it.
        momentum: the smallest value, 1 - ``decay`` (``beta`` in ema-pytorch).
        largest: the largest value once ``s`` is above 0, 1 - ``min_decay`` (``min_value`` in
            ema-pytorch).
        gamma: ``inv_gamma`` there; a larger one makes the warm-up longer.
        power: 2/3 suits runs of a million steps, 3/4 shorter ones.
        after: ``update_after_step``.

    Raises:
        ValueError: ``momentum`` or ``largest`` is outside [0, 1], ``gamma`` or ``power`` not above
            0, ``after`` or ``step`` negative.
    """
    _check_step(step)
    momentum = check_fraction("momentum", momentum)
    largest = check_fraction("largest", largest)
    gamma = check_positive("gamma", gamma)
    power = check_positive("power", power)
    after = check_integer("after", after, least=0)
    s = step - after - 1
    value = at_most(at_least(raised(1 + at_least(s, 0) / gamma, -power), momentum), largest)
    return one_until(s, value)


def warmup_ratio(step: Number, *, momentum: float = 0.0001) -> Number:
    """``max(momentum, 9 / (10 + step))``, as torch-ema and TensorFlow with ``num_updates``.

    Written there as the decay ``min(decay, (1 + n) / (10 + n))``. torch-ema's first update has
    ``n = 1``.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], or ``step`` negative.
    """
    _check_step(step)
    momentum = check_fraction("momentum", momentum)
    return at_least(9 / (10 + step), momentum)


def delayed_warmup_ratio(
    step: Number, *, momentum: float = 0.0001, largest: float = 1.0, after: int = 0
) -> Number:
    """:func:`warmup_ratio` of ``s = step - after - 1``, at most ``largest``; 1 until s is above 0.

    The schedule of diffusers' ``EMAModel`` without ``use_ema_warmup``; arguments as
    :func:`warmup_power`.

    Raises:
        ValueError: ``momentum`` or ``largest`` is outside [0, 1], ``after`` or ``step`` negative.
    """
    _check_step(step)
    momentum = check_fraction("momentum", momentum)
    largest = check_fraction("largest", largest)
    after = check_integer("after", after, least=0)
    s = step - after - 1
    return one_until(s, at_most(warmup_ratio(at_least(s, 0), momentum=momentum), largest))


def warmup_exponential(step: Number, *, momentum: float = 0.0001, tau: float = 2000) -> Number:
    """``1 - (1 - momentum) * (1 - exp(-step / tau))``, as the ``ModelEMA`` of ultralytics.

    Written there as the decay ``decay * (1 - exp(-updates / tau))``; its first update has
    ``updates = 1``. Starts near 1 and falls to ``momentum`` with the time constant ``tau``, in
    steps.

    Raises:
        ValueError: ``momentum`` is outside [0, 1], ``tau`` not above 0, or ``step`` negative.
    """
    _check_step(step)
    momentum = check_fraction("momentum", momentum)
    tau = check_positive("tau", tau)
    return 1 + (1 - momentum) * expm1(-step / tau)


def half_life_ramp_up(
    step: Number, *, half_life: float, batch_size: float = 1, ratio: float = 0.05
) -> Number:
    """A half-life that grows with training: ``min(half_life, ratio * samples seen)``.

    The average of EDM (Karras et al. 2022, arXiv 2206.00364) and StyleGAN 2. ``half_life`` is in
    samples if ``batch_size`` is given, else in steps. The momentum is 1 (a copy) at step 0.

    Raises:
        ValueError: ``half_life``, ``batch_size`` or ``ratio`` is not above 0, or ``step`` negative.
    """
    _check_step(step)
    half_life = check_positive("half_life", half_life)
    batch_size = check_positive("batch_size", batch_size)
    ratio = check_positive("ratio", ratio)
    # At least half a step, so as not to divide by 0 at step 0, where the value isn't used.
    reached = at_most(ratio * at_least(step, 0.5) * batch_size, half_life)
    return one_until(step, -expm1(-math.log(2) * batch_size / reached))


def half_life_fraction(
    step: Number, *, fraction: float = 0.05, total: float | None = None, step_bias: int = 0
) -> Number | float:
    """``1 - 2 ** (-1 / (fraction * n))``: the half-life is a fraction of the run's length ``n``.

    Of the run so far, ``n = step + 1 + step_bias``, the updates with this one, and at least 1: the
    schedule of torchtitan's ``EMA``, written there as the decay ``2 ** (-1 / (half_life_fraction *
    num_updates))``. Its memory grows with the run. Or, with ``total``, of a run of known length,
    ``n = total``: one momentum at every step.

    Args:
        fraction: the half-life in lengths of the run.
        total: the length of the whole run, in steps; None: the run so far.
        step_bias: added to the updates so far: negative at the beginning of a new phase that is to
            forget the earlier ones sooner.

    Raises:
        ValueError: ``fraction`` or ``total`` is not above 0, or ``step`` negative.
        TypeError: ``step_bias`` is no integer.
    """
    _check_step(step)
    fraction = check_positive("fraction", fraction)
    step_bias = as_integer(step_bias, "step_bias")
    if total is not None:
        return momentum_of_half_life(fraction * check_positive("total", total))
    updates = at_least(step + (1 + step_bias), 1)
    return -expm1(-math.log(2) / (fraction * updates))


def copy_first(
    step: Number, *, updates: int, then: float | Callable[[Any], Any] = 0.0002
) -> Number | float:
    """1 (a copy) for the first ``updates`` updates, later ``then(step - updates + 1)``.

    A decay of 0 at the beginning. ``then`` counts from the last copy as if the run began with it,
    so it is as :class:`~ema_fused.BaseAveragedModel`'s ``begin_step=updates``, for places that take
    a momentum alone.

    Args:
        updates: how many updates copy; 1 or 0 is the initial copy alone.
        then: the momentum after them: a number, or a function of the step as those here.

    Raises:
        ValueError: ``updates`` or ``step`` is negative, or the number ``then`` outside [0, 1].
        TypeError: ``updates`` is no integer, or ``then`` neither a number nor a function.
    """
    _check_step(step)
    updates = check_integer("updates", updates, least=0)
    since = step - max(updates, 1) + 1
    value = then(at_least(since, 1)) if callable(then) else check_fraction("then", then)
    if isinstance(since, Tensor) and not isinstance(value, Tensor):
        value = since.new_full((), float(value))
    return one_until(since, value)


def power_function(step: Number, *, sigma_rel: float = 0.1) -> Number:
    """``1 - (1 - 1 / t) ** (gamma + 1)`` with ``t = step + 1``: the power function of EDM2.

    Karras et al. 2023, arXiv 2312.02696. The average then weights the values of time tau by
    ``tau ** gamma``: its memory grows with the run, and ``sigma_rel`` is the standard deviation of
    that profile as a fraction of the run's length. :class:`~ema_fused.PowerFunctionEMA` keeps
    several at once.

    Raises:
        ValueError: ``sigma_rel`` is outside (0, 0.2887), or ``step`` negative.
    """
    _check_step(step)
    return momentum_between(gamma_of(sigma_rel), step, step + 1)


def ema_decay_sqrt(step: Number, *, momentum: float = 0.001, switch: int, total: int) -> Number:
    """A mean until ``switch``, then values weighted by ``1 - sqrt(x)``: levanter's, while training.

    Levanter's ``EmaDecaySqrtModelAveraging``, which takes the place of a learning rate that decays
    by ``1 - sqrt(x)`` (WSM, arXiv 2507.17634, does it with checkpoints: ``python -m ema_fused
    merge``). The weight of each value is ``momentum`` before step ``switch``, and
    ``1 - sqrt((step - switch) / total)`` from there on; the average is the sum divided by all
    weights so far. ``total`` steps after ``switch`` it stops changing.

    Args:
        step: counted from 0.
        momentum: ``1 - beta``.
        switch: ``switch_step``.
        total: ``decay_steps``.

    Raises:
        ValueError: ``momentum`` is not in (0, 1], ``total`` is below 1, or ``switch`` or ``step``
            negative.
    """
    _check_step(step)
    momentum = check_positive("momentum", check_fraction("momentum", momentum))
    switch = check_integer("switch", switch, least=0)
    total = check_integer("total", total, least=1)
    decayed = at_most(at_least(step - switch + 1, 0), total + 1)  # values, this one included
    latest = at_least(decayed - 1, 0)
    is_decaying = at_most(decayed, 1)
    weight = momentum * (1 - is_decaying) + is_decaying * (1 - raised(latest / total, 0.5))
    before = momentum * at_most(step + 1, switch)
    return weight / (before + decayed - _sum_of_roots(latest) / math.sqrt(total))


def _sum_of_roots(n: Number) -> Number:
    """``sqrt(1) + ... + sqrt(n)``: the first eight, and by Euler and Maclaurin those after them.

    The relative error is below 1e-11.
    """
    first = sum(math.sqrt(k) * at_most(at_least(n - k + 1, 0), 1) for k in range(1, 9))
    return first + (_integral_of_roots(at_least(n, 8)) - _integral_of_roots(8.0))


def _integral_of_roots(x: Number) -> Number:
    root = raised(x, 0.5)
    return (2 * x / 3 + 0.5) * root + 1 / (24 * root) - 1 / (1920 * root**5) + 1 / (9216 * root**9)


def momentum_of_half_life(half_life: float, *, batch_size: float = 1) -> float:
    """``1 - 0.5 ** (batch_size / half_life)``: a value's weight is halved after ``half_life``.

    ``half_life`` is in samples if ``batch_size`` is given, else in steps.

    Raises:
        ValueError: ``half_life`` or ``batch_size`` is not above 0.
    """
    half_life = check_positive("half_life", half_life)
    batch_size = check_positive("batch_size", batch_size)
    return -math.expm1(-math.log(2) * batch_size / half_life)


def in_steps(
    *,
    samples: float | None = None,
    batch_size: float | None = None,
    tokens: float | None = None,
    tokens_per_step: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
) -> float:
    """A duration in steps: ``samples / batch_size``, ``tokens / tokens_per_step`` or
    ``epochs * steps_per_epoch``.

    For every argument that is a duration::

        momentum_of_half_life(in_steps(tokens=2e9, tokens_per_step=4_000_000))
        partial(cosine, total=in_steps(epochs=300, steps_per_epoch=len(loader)))

    A step is an update of the average: an optimizer step, of all processes and micro-batches.

    Args:
        samples: with ``batch_size``, the samples of one step.
        tokens: with ``tokens_per_step``.
        epochs: with ``steps_per_epoch``.

    Raises:
        TypeError: not one duration and its measure are given.
        ValueError: a number is not above 0.
    """
    measures = [
        ("samples", samples, "batch_size", batch_size),
        ("tokens", tokens, "tokens_per_step", tokens_per_step),
        ("epochs", epochs, "steps_per_epoch", steps_per_epoch),
    ]
    given = [measure for measure in measures if measure[1] is not None or measure[3] is not None]
    if len(given) != 1 or None in given[0]:
        pairs = [pair for each in given for pair in (each[:2], each[2:])]
        found = [f"{name}={value!r}" for name, value in pairs if value is not None]
        raise TypeError(
            f"in_steps() got {', '.join(found) or 'nothing'}; one of samples= with batch_size=, "
            f"tokens= with tokens_per_step=, epochs= with steps_per_epoch= is expected"
        )
    (name, duration, measure, per) = given[0]
    duration, per = check_positive(name, duration), check_positive(measure, per)
    return duration * per if name == "epochs" else duration / per


def scale_momentum(momentum: float, kappa: float) -> float:
    """The momentum for a batch ``kappa`` times as large: ``1 - (1 - momentum) ** kappa``.

    Busbridge et al. 2023, arXiv 2307.13813: the decay is raised to the power of ``kappa``, so that
    the average forgets at the same rate per sample as before. (The learning rate has its own rule.)

    Raises:
        ValueError: ``momentum`` is outside [0, 1], or ``kappa`` not above 0.
    """
    momentum = check_fraction("momentum", momentum)
    kappa = check_positive("kappa", kappa)
    return 1.0 if momentum == 1 else -math.expm1(kappa * math.log1p(-momentum))
