"""Keywords that a class doesn't take: what other libraries call ours, and likely misspellings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TypedDict


class NoOthers(TypedDict):
    """For ``**unknown: Unpack[NoOthers]``: a type checker accepts no further keyword.

    They are taken only to be refused by :func:`unexpected_keyword`.
    """


# What others call the weight of the average, which is 1 - momentum.
_DECAYS = {
    *("decay", "ema_decay", "decay_rate", "ema_decay_rate", "ema_rate", "decay_factor"),
    *("max_decay", "beta", "ema_beta", "gamma", "polyak", "rho", "smoothing"),
}
# Some mean the weight of the average by these, others that of the new value.
_EITHER = {"alpha", "ema_alpha", "tau"}
# Parameters of warm-ups, which are functions of the step here.
_WARM_UPS = {
    *("use_num_updates", "num_updates", "use_ema_warmup", "use_warmup", "warmup", "warm_up"),
    *("warmup_steps", "warmup_iters", "inv_gamma", "power", "min_decay", "min_value"),
}
_OURS = {
    "use_buffers": "update_buffers",
    "avg_buffers": "update_buffers",
    "include_buffers": "update_buffers",
    "update_every": "every",
    "update_interval": "every",
    "update_freq": "every",
    "dtype": "averaged_dtype",
    "ema_dtype": "averaged_dtype",
    "ema_device": "device",
    "begin_iter": "begin_step",
    "start_iter": "begin_step",
    "start_step": "begin_step",
    "update_after_step": "begin_step",
    "stds": "sigma_rel",
}


def arguments_of(cls: type, base: type) -> list[str]:
    """The names of the arguments of ``cls`` and of its bases up to ``base``, each once."""
    names: dict[str, None] = {}
    for one in cls.__mro__[: cls.__mro__.index(base) + 1]:
        if "__init__" in vars(one):
            _, *taken = inspect.signature(vars(one)["__init__"]).parameters.values()
            stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            names |= {each.name: None for each in taken if each.kind not in stars}
    return list(names)


def unexpected_keyword(
    cls: type, unknown: Mapping[str, object], accepted: Sequence[str], *, decays: bool = False
) -> TypeError:
    """The error for keywords that ``cls`` doesn't take; says what the first is called here.

    Args:
        unknown: the keywords, at least one, and their values.
        accepted: the arguments that ``cls`` takes.
        decays: its momentum is the weight of the average, as others' decays are.
    """
    name, value = next(iter(unknown.items()))
    instead = _instead(name, value, accepted, decays)
    return TypeError(
        f"{cls.__name__}() got an unexpected keyword argument {name!r}{instead and ': '}{instead}. "
        f"It takes {', '.join(accepted)}"
    )


def _instead(name: str, value: object, accepted: Sequence[str], decays: bool) -> str:
    """What to pass instead of ``name``; empty if nothing is known of it."""
    if name == "gamma" and not 0 < (_number(value) or 0) < 1:
        return "MomentumAnnealingEMA and ExpMomentumEMA have a gamma"
    if name in _DECAYS | _EITHER:
        return _momentum_for(name, value, accepted, decays)
    if name in _WARM_UPS:
        return (
            "a warm-up is a momentum that is a function of the step, of ExponentialMovingAverage: "
            "momentum=functools.partial(schedules.warmup_power, momentum=0.001)"
        )
    if name in ("avg_fn", "multi_avg_fn"):
        return (
            "torch's get_ema_avg_fn(decay) is momentum=1 - decay here, and get_swa_avg_fn() is "
            "StochasticWeightAverage; other functions are avg_func of a BaseAveragedModel"
        )
    if name == "momentum":
        return "take ExponentialMovingAverage, which has a momentum"
    ours = _OURS.get(name, "")
    close = [ours] if ours in accepted else difflib.get_close_matches(name, accepted, n=1)
    return f"perhaps {close[0]} is meant" if close else ""


def _momentum_for(name: str, value: object, accepted: Sequence[str], decays: bool) -> str:
    number = _number(value)
    is_weight = name in _EITHER and number is not None and number < 0.5
    if callable(value) and number is None:
        momentum = f"lambda step: 1 - {name}(step)"
    elif number is None or not 0 <= number <= 1:
        momentum = f"1 - {name}"
    else:
        momentum = repr(number if is_weight is not decays else _complement(number))
    if decays:
        return f"pass momentum={momentum}, here the weight of the average"
    of_what = "the weight of the model's values" + ("" if is_weight else f", 1 - {name}")
    if "momentum" in accepted:
        return f"pass momentum={momentum}, {of_what}"
    return f"take ExponentialMovingAverage(model, momentum={momentum}), {of_what}"


def _complement(number: float) -> float:
    """``1 - number`` in decimals: of 0.999 it is 0.001, not 0.0010000000000000009."""
    return float(1 - Decimal(repr(number)))


def _number(value: object) -> float | None:
    """``value`` as a float; None if it isn't a number."""
    if isinstance(value, str):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
