"""From the format of one package to that of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ema_fused.converting.average_state import (
    AverageState,
    Tensors,
    Wanted,
    listed,
    tensors_in,
)
from ema_fused.converting.own_parts import MEAN, notes_of
from ema_fused.converting.reading import Mapped, names_of, read_average, read_tree
from ema_fused.converting.recognising_averages import FORMATS, TARGETS, NoAverageError
from ema_fused.converting.shadow_lists import with_names
from ema_fused.converting.writing import check_output, write
from ema_fused.engine.checks import check_fraction, check_integer
from ema_fused.merging.recognising import PathLike

_NAMELESS = ("torch-ema", "diffusers-list")
_OURS = ("ema_fused", "huggingface")
_WITH_WEIGHTS = ("lightning", "mmengine", "mmcv", "timm", "ema-pytorch")
_OF_PARAMETERS = (*_NAMELESS, "torchtitan")  # which hold nothing else


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What :func:`convert` has done.

    Attributes:
        source: the format that was read.
        target: the format that was written.
        output: where.
        tensors: how many averages.
        steps: how many updates they have had; None: not known.
        decay: None: not known.
        lost: what the new format has no place for, and what was made up for it.
    """

    source: str
    target: str
    output: Path
    tensors: int
    steps: int | None
    decay: float | None
    lost: tuple[str, ...]


def convert(
    path: PathLike,
    target: str,
    output: PathLike,
    *,
    key: str | None = None,
    source: str | None = None,
    steps: int | None = None,
    decay: float | None = None,
    raw: PathLike | None = None,
    names: PathLike | Sequence[str] | None = None,
    folder: PathLike | None = None,
    averages_in: str | None = None,
) -> Conversion:
    """Writes the average in a checkpoint as another package writes its own.

    The tensors stay as they are, to the bit, and are read from disk as they are written. ``output``
    is complete or absent; files that are there are replaced, folders are not.

    Args:
        path: a file or folder with an average.
        target: the name of a format.
        output: a file (``.pt``, ``.pth``, ``.ckpt``; ``.safetensors`` for ours) or a folder.
        key: where the average is in nested dictionaries; None: found.
        source: the name of its format; None: found. ``"weights"``: all tensors there are averages.
        steps: the number of updates, where the source doesn't keep it, or another.
        decay: of the average, likewise.
        raw: a checkpoint with the weights of the model, for formats that keep both.
        names: of the parameters in their order, for formats that are lists: names, or a file with
            one in each line, or one of ``torch.save`` with the model's ``state_dict``.
        folder: of the model, with its ``config.json``, for formats that are folders of it.
        averages_in: of mmcv 1.x: ``"parameters"`` or ``"buffers"``.

    Raises:
        FileNotFoundError: a path isn't there.
        ValueError: the average isn't found, or lacks what the new format can't do without.
        FileExistsError: ``output`` is a folder with files in it.
    """
    if target not in TARGETS:
        raise ValueError(f"the format {target!r} is none of {', '.join(TARGETS)}")
    format = FORMATS[target]
    goal = Path(output)
    check_output(goal, format)
    state = read_average(path, key=key, source=source, averages_in=averages_in)
    state = _told(state, steps, decay)
    listing = None if names is None else names_of(names, state)
    if state.unnamed is not None and target not in _NAMELESS:
        state = with_names(state, _needed(listing, state))
    if listing is not None:
        state = dataclasses.replace(state, parameters=frozenset(listing))
    if raw is not None:
        state = _with_weights(state, _weights_at(raw, state))
    elif state.format in _OF_PARAMETERS and target not in _OF_PARAMETERS:
        note = (
            f"buffers, if the model has any: {state.format} has averages of parameters alone; "
            f"--raw PATH (raw=) takes them from the model"
        )
        state = dataclasses.replace(state, notes=(*state.notes, note))
    mapped = Mapped().all(state)
    assert format.build is not None
    built = format.build(mapped, Wanted(names=listing, folder=folder))
    _refuse_losing_weights(goal, Path(path), state, target)
    write(goal, built)
    beside = tuple(f"not carried: {name!r}" for name in state.beside)
    tensors = len(state.averaged) if state.unnamed is None else len(state.unnamed)
    lost = (*state.notes, *_ours_alone(state, target), *built.lost, *beside)
    return Conversion(state.format, target, goal, tensors, state.steps, state.decay, lost)


def _ours_alone(state: AverageState, target: str) -> tuple[str, ...]:
    """What no other package keeps of an average of ours."""
    if target in _OURS:
        return ()
    notes = notes_of(state.more)
    if state.kind == MEAN:
        notes += (
            "that the average is the mean of all values so far: it goes on as the other package is "
            "set up. Its count is of calls; with interval or every above 1 pass the number of "
            "averages by --steps (steps=)",
        )
    return notes


def _refuse_losing_weights(goal: Path, source: Path, state: AverageState, target: str) -> None:
    """Raises ValueError if the only weights of the model would be overwritten."""
    if state.raw is not None and target not in _WITH_WEIGHTS and goal.resolve() == source.resolve():
        raise ValueError(
            f"{goal} is the input, and has the weights of the model too, for which {target} has no "
            f"place; write elsewhere"
        )


def _told(state: AverageState, steps: int | None, decay: float | None) -> AverageState:
    if steps is not None:
        state = dataclasses.replace(state, steps=check_integer("steps", steps, least=0))
    if decay is not None:
        state = dataclasses.replace(state, decay=check_fraction("decay", decay))
    return state


def _with_weights(state: AverageState, raw: Tensors) -> AverageState:
    """The state with the weights of the model, and what it lacks (buffers, say) as they have it."""
    if state.unnamed is not None:
        return state
    more = {name: tensor for name, tensor in raw.items() if name not in state.averaged}
    notes = state.notes
    if more:
        notes += (f"not in the average, and as in the weights: {listed(list(more))}",)
    averaged = {**state.averaged, **more}
    return dataclasses.replace(state, raw=raw, averaged=averaged, notes=notes)


def _needed(names: list[str] | None, state: AverageState) -> list[str]:
    if names is None:
        raise ValueError(
            f"{state.format} keeps a list of averages without names; pass the names of the model's "
            f"parameters by --names FILE (names=): one in each line, or a state_dict of the model"
        )
    return names


def _weights_at(path: PathLike, state: AverageState) -> Tensors:
    """The weights of the model in another checkpoint: the only tensors with the average's names."""
    try:
        other = read_average(path)
    except NoAverageError:
        other = None
    if other is not None and other.raw is not None:
        return other.raw
    tree, _ = read_tree(path)
    found = [
        tensors for tensors in _candidates(tree) if all(name in tensors for name in state.averaged)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{path} has {len(found)} dictionaries with the names of the average "
            f"({listed(list(state.averaged))}); one with the weights of the model is expected"
        )
    return found[0]


def _candidates(tree: object) -> list[Tensors]:
    if not isinstance(tree, Mapping):
        return []
    found: list[Tensors] = [tensors_in(tree)]
    for name, inside in tree.items():
        if "optim" not in str(name).lower():
            found += _candidates(inside)
    return found
