"""The options of every averaged model apart from its momentum."""

from __future__ import annotations

from typing import TypedDict

import torch

from ema_fused.engine import backends
from ema_fused.engine.checks import check_integer
from ema_fused.engine.rounding import check_rounding, check_seed
from ema_fused.modules.choosing import Buffers
from ema_fused.modules.leaving_out import Parameters
from ema_fused.modules.sharding import Device


class Options(TypedDict, total=False):
    """The arguments of :class:`~ema_fused.BaseAveragedModel` by name, except the model."""

    interval: int
    device: Device
    update_buffers: Buffers
    averaged_dtype: torch.dtype | None
    share_frozen: bool
    begin_step: int
    backend: str | None
    rounding: str
    seed: int
    every: int
    offload: str | None
    overlap: bool
    capturable: bool
    distance_every: int | None
    version_counters: bool | None
    skip_nonfinite: bool
    include: Parameters | None
    exclude: Parameters | None


# Options that only an average by a momentum can have, and their defaults.
_NEED_MOMENTUM = (
    ("rounding", "nearest"),
    ("every", 1),
    ("offload", None),
    ("overlap", False),
    ("capturable", False),
    ("distance_every", None),
)


def needing_momentum(options: Options) -> str:
    """The options given that only an average by a momentum can have; "" if there are none."""
    given = [
        f"{option}={options[option]!r}"  # type: ignore[literal-required]
        for option, usual in _NEED_MOMENTUM
        if options.get(option, usual) != usual
    ]
    return ", ".join(given)


def refuse_one_by_one(name: str, options: Options) -> None:
    """Raises ValueError for options that a class with its own ``avg_func`` can't have.

    Args:
        name: the name of the class, for the message.
    """
    needed = needing_momentum(options)
    if needed:
        raise ValueError(
            f"{name} averages by its own avg_func, which does as it likes; "
            f"{needed} needs a class that defines momentum_at"
        )


def refuse_momenta(name: str, options: Options, *, one_by_one: bool) -> None:
    """Raises ValueError where a momentum by name can't be.

    Args:
        name: the name of the class, for the message.
        one_by_one: whether it averages by its own ``avg_func``.
    """
    if one_by_one:
        raise ValueError(
            f"{name} averages by its own avg_func, which does as it likes; a momentum by name "
            f"needs a class that leaves averaging to ExponentialMovingAverage"
        )
    for option in ("offload", "capturable"):
        if options.get(option):
            raise ValueError(
                f"a momentum by name with {option}={options[option]!r}: that takes one momentum "
                f"for all tensors; pass a number or a function of the step, or leave {option} out"
            )


def check_options(options: Options) -> None:
    """Makes plain integers of ``options``' integers.

    Raises TypeError, ValueError or RuntimeError for invalid values and combinations.
    """
    options["interval"] = check_integer("interval", options["interval"], least=1)
    options["begin_step"] = check_integer("begin_step", options["begin_step"], least=0)
    options["every"] = check_integer("every", options["every"], least=1)
    device = options["device"]
    if not (device is None or isinstance(device, (str, int, torch.device))):
        raise TypeError(f"device is {device!r}; a torch.device, or its name, is expected")
    dtype = options["averaged_dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"averaged_dtype is {dtype!r}; a floating-point dtype is expected")
    if options["backend"] is not None:
        backends.pinned(options["backend"])
    check_rounding(options["rounding"])
    options["seed"] = check_seed(options["seed"])
    if options["offload"] not in (None, "cpu"):
        raise ValueError(f"offload is {options['offload']!r}; None or 'cpu' is expected")
    if options["distance_every"] is not None:
        options["distance_every"] = check_integer(
            "distance_every", options["distance_every"], least=1
        )
    if options["version_counters"] not in (None, True, False):
        raise TypeError(
            f"version_counters is {options['version_counters']!r}; True, False or None is expected"
        )
    _check_together(options)


def _check_together(options: Options) -> None:
    interval = options["interval"]
    every, offload = options["every"], options["offload"] is not None
    capturable, measures = options["capturable"], options["distance_every"] is not None
    impossible = [
        (
            every > 1 and interval > 1,
            f"interval={interval} with every={every}",
            "both skip calls: every= averages with the momentum of all the calls it stands for, "
            "interval= with that of one; take one of them",
        ),
        (
            offload and interval > 1,
            f"offload='cpu' with interval={interval}",
            "between its averages an interval still copies buffers; skip whole calls by every=",
        ),
        (
            offload and options["overlap"],
            "offload='cpu' with overlap=True",
            "an offloaded update runs beside the training as it is; leave overlap out",
        ),
        (
            capturable and (offload or options["overlap"] or every > 1),
            "capturable=True with offload=, overlap= or every=",
            "a CUDA graph replays one and the same work at every step, on the device; leave them "
            "out (of a captured step, interval= can skip averages)",
        ),
        (
            capturable and measures,
            "capturable=True with distance_every=",
            "a CUDA graph replays one and the same work, so it can't sample; measure with "
            "Plan.lerp_(..., squared_distance=...) at every step, or don't capture",
        ),
    ]
    for is_so, what, why in impossible:
        if is_so:
            raise ValueError(f"{what}: {why}")
