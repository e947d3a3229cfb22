"""Takes the state of an average of any known format into an averaged model."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from ema_fused.converting.average_state import (
    MODULE,
    AverageState,
    Wanted,
    each_once,
    is_averageable,
    listed,
    told,
)
from ema_fused.converting.own_parts import INITIAL, PARTS, SEED, WINDOW, notes_of
from ema_fused.converting.reading import Mapped, read_average
from ema_fused.converting.recognising_averages import find
from ema_fused.converting.shadow_lists import with_names
from ema_fused.engine.checks import check_integer
from ema_fused.engine.dtensors import is_sharded, local
from ema_fused.engine.notices import warn
from ema_fused.modules.naming import match_names
from ema_fused.modules.paired_module import PairedModule

_LATE = 2**40  # a step at which every warm-up is over


@dataclass(frozen=True)
class LoadedState:
    """What :meth:`BaseAveragedModel.load_state_from` has loaded.

    Attributes:
        format: of the state.
        steps: what ``averaged.steps`` is now.
        decay: 1 - momentum, as the state has it; None: it doesn't keep it. The average's own
            momentum stays as it is.
        kept: tensors of the average that the state lacks, and that were left as they were.
        lost: what isn't taken over.
        parts: what else was taken over from a state of the same class: ``window.``, ``initial.``,
            ``rounding_seed``.
    """

    format: str
    steps: int
    decay: float | None
    kept: tuple[str, ...]
    lost: tuple[str, ...]
    parts: tuple[str, ...] = ()


def load_foreign(
    averaged: PairedModule,
    state: Mapping[Any, Any] | str | os.PathLike[str],
    *,
    calls_per_average: int,
    steps: int | None,
    key: str | None,
    source: str | None,
    averages_in: str | None,
) -> LoadedState:
    """Loads it; arguments and errors as :meth:`BaseAveragedModel.load_state_from`.

    Args:
        averaged: an averaged model; its calls are counted.
        calls_per_average: how many of them make one average.
    """
    if steps is not None:
        check_integer("steps", steps, least=0)
    if isinstance(state, Mapping):
        found = find(state, Wanted(averages_in=averages_in), key=key, source=source)
    else:
        found = read_average(state, key=key, source=source, averages_in=averages_in)
        found = Mapped().all(found)
    own = averaged.module.state_dict(keep_vars=True)
    tensors = {name: one for name, one in own.items() if isinstance(one, Tensor)}
    values = dict(averaged.state_dict(keep_vars=True))
    if found.unnamed is not None:
        found = with_names(found, _parameters(averaged, found))
    lost = list(found.notes)
    count = _count(found, steps, calls_per_average, lost)
    matched = _matched(averaged, tensors, found)
    differing = []
    for name, other in matched.items():
        value = _fitting(name, tensors[name], found.averaged[other], lost)
        if name not in averaged.shared_names:
            values[MODULE + name] = value
        elif not torch.equal(local(value), local(tensors[name]).to(value.device, value.dtype)):
            differing.append(name)
    if differing:
        lost.append(
            f"frozen parameters that the average shares with the model have other values in the "
            f"state, and keep the model's: {listed(differing)}"
        )
    kept = tuple(name for name in tensors if name not in matched)
    parts = _take_parts(values, found, matched, lost)
    state_dict = OrderedDict(values, steps=torch.tensor(count))
    if found.kind is not None:
        # As ``state_dict()`` keeps it: another kind of average warns.
        vars(state_dict)["_metadata"] = {"": {"average": found.kind}}
    averaged.load_state_dict(state_dict)
    _question_momentum(averaged, found, lost)
    return LoadedState(found.format, count, found.decay, kept, tuple(dict.fromkeys(lost)), parts)


def _parameters(averaged: PairedModule, found: AverageState) -> list[str]:
    """The names of the parameters that a list has: all, or those that are trained."""
    assert found.unnamed is not None
    names = dict(averaged.module.named_parameters())
    if len(found.unnamed) != len(names):
        trained = {name: one for name, one in names.items() if name not in averaged.shared_names}
        if len(trained) == len(found.unnamed):
            return list(trained)
    return list(names)


def _count(found: AverageState, steps: int | None, calls_per_average: int, lost: list[str]) -> int:
    if steps is not None:
        return steps
    if found.steps is None:
        lost.append(
            f"{found.format} doesn't keep the number of updates: steps is 1, as of one value, so "
            f"that warm-ups and means begin anew; pass steps="
        )
        return 1
    if found.counts_averages:
        return found.steps * calls_per_average
    return found.steps


def _matched(
    averaged: PairedModule, tensors: dict[str, Tensor], found: AverageState
) -> dict[str, str]:
    """The name in the state of each tensor of the average; of buffers that it may lack, not.

    Raises:
        KeyError: a parameter is missing, or the state has a tensor that the average hasn't.
    """
    parameters = {name for name, _ in averaged.module.named_parameters(remove_duplicate=False)}
    once = {name for name, _ in each_once(tensors)}
    needed = {
        name: name in parameters and name in once and name not in averaged.shared_names
        for name in tensors
    }
    try:
        return match_names(needed, dict.fromkeys(found.averaged, True))
    except KeyError:
        raise KeyError(
            f"the state of {found.format} isn't of this model: the average has "
            f"{listed(sorted(name for name in needed if name not in found.averaged))} that the "
            f"state lacks, and the state {listed(sorted(found.averaged.keys() - needed.keys()))} "
            f"that the average lacks. Make the average of the same model"
        ) from None


def _take_parts(
    values: dict[str, Tensor], found: AverageState, matched: dict[str, str], lost: list[str]
) -> tuple[str, ...]:
    """Puts what the state has of the class's own parts into ``values``, each whole or not at all.

    Args:
        values: the average's state.
        matched: the name in the state of each averaged tensor.

    Returns:
        The parts that were taken.
    """
    taken = []
    for part in PARTS:
        own = {key: one for key, one in values.items() if key.startswith(part)}
        theirs = {key: one for key, one in found.more.items() if key.startswith(part)}
        if own and theirs:
            fitted = _fitted(part, own, theirs, matched, lost)
            if fitted is not None:
                for key in own:
                    del values[key]
                values |= fitted
                taken.append(part)
                continue
        lost += notes_of(theirs)
        if own and part == INITIAL:
            lost.append(
                "the weights that BiasCorrectedEMA corrects by aren't in the state: they stay "
                "those that this average has begun with"
            )
    return tuple(taken)


def _fitted(
    part: str,
    own: dict[str, Tensor],
    theirs: Mapping[str, Any],
    matched: dict[str, str],
    lost: list[str],
) -> dict[str, Tensor] | None:
    """A part of a state under the average's names; None: it is of other tensors.

    A window may have another number of checkpoints than the average's.
    """
    fitted = {key: theirs[key] for key in own if key in theirs and not _name_in(key)[1]}
    samples = {name: one for key, one in own.items() if (name := _name_in(key)[1])}
    if not samples and part != SEED:
        return None  # the model's first pass tells its shapes, and hasn't been made
    first_names = {name for name, _ in each_once(samples)}
    for place in dict.fromkeys(_name_in(key)[0] for key in theirs if _name_in(key)[1]):
        for name, sample in samples.items():
            value = theirs.get(place + matched.get(name, name))
            if value is None and name not in first_names:
                fitted[place + name] = sample  # tied, and saved by its first name alone
                continue
            if value is None or tuple(value.shape) != tuple(sample.shape):
                return None
            fitted[place + name] = _fitting(name, sample, value, lost)
    return fitted


def _name_in(key: str) -> tuple[str, str]:
    """What stands before the name of a tensor in a part's key, and the name; none of a count."""
    if key.startswith(WINDOW):
        number, _, name = key.removeprefix(WINDOW).partition(".")
        return f"{WINDOW}{number}.", name
    return (INITIAL, key.removeprefix(INITIAL)) if key.startswith(INITIAL) else (key, "")


def _fitting(name: str, own: Tensor, value: Any, lost: list[str]) -> Tensor:
    """``value``, sharded as the average's own tensor.

    Raises:
        ValueError: the shapes differ.
        TypeError: only one of them can be averaged.
    """
    if tuple(own.shape) != tuple(value.shape):
        raise ValueError(
            f"{name!r} has the shape {tuple(value.shape)} in the state, and {tuple(own.shape)} in "
            f"the average; make the average of the same model"
        )
    if is_averageable(own) != is_averageable(value):
        raise TypeError(
            f"{name!r} is {value.dtype} in the state and {own.dtype} in the average; both "
            f"floating-point or both integer is expected"
        )
    if torch.promote_types(own.dtype, value.dtype) != own.dtype:
        lost.append(
            f"precision: {value.dtype} in the state, rounded to the {own.dtype} of the average; "
            f"averaged_dtype= keeps it"
        )
    if is_sharded(own) and not is_sharded(value):
        place: Any = own
        value = distribute_tensor(
            value.to(own.device), place.device_mesh, place.placements, src_data_rank=None
        )
    fitting: Tensor = value
    return fitting


def _question_momentum(averaged: PairedModule, found: AverageState, lost: list[str]) -> None:
    """Warns where the average goes on with another momentum, of those that are one number."""
    model: Any = averaged
    momentum = getattr(model, "momentum", None)
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        return
    with contextlib.suppress(NotImplementedError):
        if model.momentum_at(1) != momentum or model.momentum_at(_LATE) != momentum:
            return
    if found.warm_up is not None and found.warm_up.kind != "none":
        lost.append(
            f"the warm-up of the decay ({told(found.warm_up)}): pass one of ema_fused.schedules as "
            f"momentum="
        )
    if found.decay is not None and abs(1 - found.decay - momentum) > 1e-9:
        warn(
            f"the state was averaged with decay {found.decay:g}, momentum {1 - found.decay:.6g}, "
            f"and goes on with momentum {momentum:g}; pass momentum={1 - found.decay:.6g} to the "
            f"average, unless the change is meant"
        )
