"""States of ``PowerFunctionEMA``: several averages in one, each of another width."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ema_fused.converting.average_state import (
    AverageState,
    Format,
    Wanted,
    is_tensor,
    number,
    tensors_in,
)
from ema_fused.merging.stored_tensors import Contents

_AVERAGES = "averages"
_EXTRA = "_extra_state"
_KEY = re.compile(rf"{_AVERAGES}\.(\d+)\.")
_NOTES = "PowerFunctionEMA"  # in the dictionary of one average


def averages_in(state: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The averages in a state by their keys, each a dictionary that says what it is."""
    numbers = {int(found[1]) for key in state if (found := _KEY.match(str(key)))}
    extra = state.get(_EXTRA)
    told = extra if isinstance(extra, Mapping) else {}
    widths = list(told.get("sigma_rel", ()))
    for one in sorted(numbers):
        key = f"{_AVERAGES}.{one}"
        width = widths[one] if one < len(widths) else None
        notes = {"sigma_rel": width, "steps": told.get("steps")}
        yield key, {_NOTES: notes, **tensors_in(state, f"{key}.")}


def _read(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    told = state.get(_NOTES)
    if not isinstance(told, Mapping):
        return None
    width = "of unknown width" if told["sigma_rel"] is None else f"sigma_rel {told['sigma_rel']:g}"
    return AverageState(
        "power-function",
        tensors_in(state),
        steps=number(told["steps"]),
        variant=f"PowerFunctionEMA, {width}",
        notes=(f"the profile of its width ({width}), by which only PowerFunctionEMA goes on",),
    )


def with_written_one(rest: Contents, written: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that our callback for the Trainer writes in two files.

    Args:
        rest: the file with what isn't the model that is written for ``from_pretrained``.
        written: that model's tensors, which are one of the averages.

    Returns:
        The whole state; None: it is of another kind of average.
    """
    extra = rest.metadata.get(_EXTRA)
    if extra is None:
        return None
    told = json.loads(extra)
    state: dict[str, Any] = {**rest.tree, _EXTRA: told}
    names = [name for name, value in written.items() if is_tensor(value)]
    for one in range(len(told["sigma_rel"])):
        keys = [f"{_AVERAGES}.{one}.{name}" for name in names]
        if not all(key in state for key in keys):
            state |= {key: written[name] for key, name in zip(keys, names, strict=True)}
    return state


POWER_FUNCTION = Format(
    "power-function",
    "PowerFunctionEMA",
    "averages.0.*",
    _read,
    None,
)
