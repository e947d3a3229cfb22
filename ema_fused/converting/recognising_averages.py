"""Whose average a checkpoint holds, by its content."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ema_fused.converting.average_state import (
    AverageState,
    Format,
    Tensors,
    Wanted,
    is_averageable,
    listed,
    tensors_in,
)
from ema_fused.converting.averaged_modules import EMA_PYTORCH, OURS, TORCH
from ema_fused.converting.folders import DIFFUSERS, HUGGINGFACE, TORCHTITAN
from ema_fused.converting.power_functions import POWER_FUNCTION, averages_in
from ema_fused.converting.shadow_lists import DIFFUSERS_LIST, TORCH_EMA
from ema_fused.converting.training_checkpoints import LIGHTNING, MMCV, MMENGINE, TIMM

FORMATS = {
    format.name: format
    for format in (
        OURS,
        TORCH,
        LIGHTNING,
        HUGGINGFACE,
        MMENGINE,
        MMCV,
        TIMM,
        DIFFUSERS,
        DIFFUSERS_LIST,
        EMA_PYTORCH,
        TORCH_EMA,
        TORCHTITAN,
        POWER_FUNCTION,
    )
}
TARGETS = tuple(name for name, format in FORMATS.items() if format.build is not None)
"""The formats that are written too."""
WEIGHTS = "weights"
"""A checkpoint of plain weights that are averages, which only its owner can know."""


class NoAverageError(ValueError):
    """A checkpoint without an average of a known format."""


def find(
    tree: Mapping[Any, Any],
    wanted: Wanted,
    *,
    key: str | None = None,
    source: str | None = None,
    where: str = "the state",
) -> AverageState:
    """The only average in a checkpoint.

    Args:
        tree: nested dictionaries.
        wanted: what is known beside it.
        key: where the average is, as ``ema`` or ``callbacks.ema``; None: found.
        source: the name of its format; None: found. ``"weights"``: all tensors at ``key`` are
            averages.
        where: the name of the checkpoint in messages.

    Raises:
        NoAverageError: there is none.
        ValueError: there are several, or it is damaged, or an argument is unknown.
    """
    if source is not None and source not in (*FORMATS, WEIGHTS):
        raise ValueError(
            f"the format {source!r} is none of {', '.join((*FORMATS, WEIGHTS))}; leave it out to "
            f"have it found"
        )
    if source == WEIGHTS:
        return _weights(tree, key, where)
    asked = list(FORMATS.values()) if source is None else [FORMATS[source]]
    every = list(_walk("", tree, asked, wanted))
    found = [state for state in every if key in (None, state.key)]
    if every and not found:
        there = ", ".join(f"{one.format} at key {one.key!r}" for one in every)
        raise NoAverageError(f"{where} has no average at key {key!r}; there are: {there}")
    if not found:
        raise NoAverageError(_explain_none(tree, key, asked, where))
    if len(found) > 1:
        told = ", ".join(map(_told, found))
        raise ValueError(
            f"{where} holds several averages: {told}; choose one by --key (key=) or --from "
            f"(source=)"
        )
    state = found[0]
    if state.raw is None and state.averaged:
        state = dataclasses.replace(state, raw=_weights_beside(tree, state))
    return state


def _told(state: AverageState) -> str:
    which = f" ({state.variant})" if state.variant else ""
    return f"{state.format} at key {state.key!r}{which}"


def _walk(
    key: str, inside: Mapping[Any, Any], formats: list[Format], wanted: Wanted
) -> Iterator[AverageState]:
    """All averages; not those that are a part of another one."""
    states = [state for format in formats if (state := format.read(inside, wanted)) is not None]
    yield from (dataclasses.replace(state, key=key) for state in states)
    if not states:
        for path, part in (*_parts(key, inside), *_parts(key, dict(averages_in(inside)))):
            yield from _walk(path, part, formats, wanted)


def _parts(key: str, inside: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for name, part in inside.items():
        if isinstance(name, str) and isinstance(part, Mapping) and "optim" not in name.lower():
            yield f"{key}.{name}" if key else name, part


def _dictionaries(key: str, inside: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    yield key, inside
    for path, part in _parts(key, inside):
        yield from _dictionaries(path, part)


def _weights_beside(tree: Mapping[Any, Any], state: AverageState) -> Tensors | None:
    """The weights of the model: the only other dictionary with tensors like the averages."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.averaged.items()}
    found = []
    for key, inside in _dictionaries("", tree):
        tensors = tensors_in(inside)
        if key != state.key and all(
            name in tensors and tuple(tensors[name].shape) == shape
            for name, shape in shapes.items()
        ):
            found.append(tensors)
    return found[0] if len(found) == 1 else None


def _weights(tree: Mapping[Any, Any], key: str | None, where: str) -> AverageState:
    found = {
        path: tensors
        for path, inside in _dictionaries("", tree)
        if any(map(is_averageable, (tensors := tensors_in(inside)).values()))
        and key in (None, path)
    }
    if len(found) != 1:
        raise ValueError(
            f"{where} holds {len(found)} dictionaries of weights (at keys {listed(list(found))}); "
            f"one is expected, or its --key (key=)"
        )
    (path, tensors), *_ = found.items()
    return AverageState(WEIGHTS, tensors, key=path)


def _explain_none(tree: Mapping[Any, Any], key: str | None, asked: list[Format], where: str) -> str:
    wanted = "; ".join(f"{format.marks} ({format.title})" for format in asked)
    seen: list[str] = []
    for path, inside in _dictionaries("", tree):
        if key in (None, path) and len(seen) < 4:
            seen.append(f"at {path!r} {listed([str(name) for name in inside])}")
    hint = (
        "If these are averaged weights alone, say so by --from weights (source='weights'), and "
        "give the number of updates"
    )
    return (
        f"{where} holds no average of a known format. Looked for: {wanted}. Found: "
        f"{'; '.join(seen) or 'nothing'}. {hint}"
    )
