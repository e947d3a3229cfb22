"""Checkpoints of trainings that hold an average: Lightning's, mmengine's, mmcv's, timm's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch

from ema_fused.converting.average_state import (
    MODULE,
    AverageState,
    Built,
    Format,
    Wanted,
    count_or_one,
    listed,
    names_beside,
    note_of_decay,
    number,
    raw_or_error,
    tensors_in,
)

_STATE = "state_dict"
_EMA = "ema_"

# ---- Lightning -----------------------------------------------------------------------------------

_OWN, _COUNTS = "current_model_state", "averaging_state"


def _read_lightning(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    parts = [state.get(key) for key in (_STATE, _OWN, _COUNTS)]
    if not all(isinstance(part, Mapping) for part in parts):
        return None
    averaged, own, counts = parts
    assert isinstance(averaged, Mapping) and isinstance(own, Mapping)
    assert isinstance(counts, Mapping)
    return AverageState(
        "lightning",
        tensors_in(averaged),
        tensors_in(own) or None,
        steps=number(counts.get("n_averaged")),
        counts_averages=True,
        beside=names_beside(state, _STATE, _OWN, _COUNTS),
    )


def _build_lightning(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    raw = raw_or_error(state, "Lightning's WeightAveraging")
    tree = {
        _STATE: dict(state.averaged),
        _OWN: dict(raw),
        _COUNTS: {"n_averaged": torch.tensor(count_or_one(state, lost))},
    }
    lost.append(
        "the rest of a checkpoint of a training (loops, optimizers): fit(ckpt_path=...) needs it; "
        "put these three keys into one of this model, or pass it to the callback's "
        "on_load_checkpoint"
    )
    return Built(tree, lost=tuple(lost))


# ---- mmengine ------------------------------------------------------------------------------------

_MMENGINE = "ema_state_dict"


def _read_mmengine(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    averaged, other = state.get(_STATE), state.get(_MMENGINE)
    if not isinstance(averaged, Mapping) or not isinstance(other, Mapping):
        return None
    # EMAHook exchanges the two when it saves, so that the averages are in the state_dict.
    return AverageState(
        "mmengine",
        tensors_in(averaged),
        tensors_in(other, MODULE),
        steps=number(other.get("steps")),
        beside=names_beside(state, _STATE, _MMENGINE),
    )


def _build_mmengine(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    raw = raw_or_error(state, "mmengine")
    exchanged = {MODULE + name: raw[name] for name in state.averaged}
    tree = {
        # Runner.resume() wants these; they are those of a training that begins.
        "meta": {"epoch": 0, "iter": 0},
        "message_hub": {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}},
        _STATE: dict(state.averaged),
        _MMENGINE: {"steps": torch.tensor(count_or_one(state, lost)), **exchanged},
    }
    lost.append("epoch and iter of the training, which are 0, its optimizer and its messages")
    return Built(tree, lost=tuple(lost))


# ---- mmcv 1.x ------------------------------------------------------------------------------------

_MARK = "averages_in"  # of the checkpoints that are written here


def _read_mmcv(state: Mapping[Any, Any], wanted: Wanted) -> AverageState | None:
    inside = state.get(_STATE)
    if not isinstance(inside, Mapping):
        inside = state
    tensors = tensors_in(inside)
    buffers = {name: tensor for name, tensor in tensors.items() if _is_of_mmcv(name)}
    others = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    if not buffers:
        return None
    owners = _owners(others)
    if not all(name in owners for name in buffers):
        return None
    shared = [f"{name} of {', '.join(owners[name])}" for name in buffers if len(owners[name]) > 1]
    if shared:
        raise ValueError(
            f"mmcv names averages after parameters with dots as underscores, which makes some "
            f"equal here: {listed(shared)}; rename the layers, or convert while it is loaded"
        )
    exchanged = others | {owners[name][0]: tensor for name, tensor in buffers.items()}
    averaged, raw = others, exchanged
    steps = number(_at(state, "meta", "iter"))
    if _averages_of_mmcv(state, wanted) == "buffers":
        averaged, raw = exchanged, others
        # Written within an iteration, which is counted at its end.
        steps = None if steps is None else steps + 1
    return AverageState(
        "mmcv",
        averaged,
        raw,
        steps=steps,
        parameters=frozenset(owners[name][0] for name in buffers),
        beside=names_beside(state, _STATE) if inside is not state else (),
    )


def _is_of_mmcv(name: str) -> bool:
    return name.startswith(_EMA) and "." not in name


def _owners(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parameters by the name that mmcv's ``EMAHook`` gives their buffers."""
    owners: dict[str, list[str]] = {}
    for name in tensors:
        owners.setdefault(_EMA + name.replace(".", "_"), []).append(name)
    return owners


def _averages_of_mmcv(state: Mapping[Any, Any], wanted: Wanted) -> str:
    """Where the averages are: mmcv exchanges them with the weights, but only after an epoch.

    Raises:
        ValueError: nothing in the checkpoint tells.
    """
    if wanted.averages_in is not None:
        if wanted.averages_in not in ("parameters", "buffers"):
            raise ValueError(
                f"averages_in is {wanted.averages_in!r}; 'parameters' or 'buffers' is expected"
            )
        return wanted.averages_in
    if _at(state, "meta", _MARK) == "parameters":
        return "parameters"
    last = PurePosixPath(str(_at(state, "meta", "hook_msgs", "last_ckpt")).replace("\\", "/")).name
    if last.startswith("epoch_"):
        return "parameters"
    if last.startswith("iter_"):
        return "buffers"
    raise ValueError(
        "a checkpoint of mmcv 1.x doesn't say where its averages are: after an epoch of an "
        "EpochBasedRunner they are in the parameters, and the ema_* buffers hold the weights; in "
        "those of an IterBasedRunner they are in the buffers. Pass --averages-in parameters or "
        "buffers (averages_in=)"
    )


def _at(inside: Any, *keys: str) -> Any:
    for key in keys:
        inside = inside.get(key) if isinstance(inside, Mapping) else None
    return inside


def _build_mmcv(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    raw = raw_or_error(state, "mmcv 1.x")
    names = [name for name in state.averaged if state.is_parameter(name)]
    buffers = {_EMA + name.replace(".", "_"): raw[name] for name in names}
    if len(buffers) < len(names):
        raise ValueError(
            "mmcv names averages after parameters with dots as underscores, and two parameters "
            "here would get one name; it can't hold an average of this model"
        )
    differing = [
        name
        for name in state.averaged
        if name not in names and raw[name] is not state.averaged[name]
    ]
    if differing:
        lost.append(
            f"averages of buffers, which mmcv copies from the model: {listed(differing)} are as in "
            f"the average"
        )
    meta: dict[str, Any] = {"epoch": 0, "iter": count_or_one(state, lost), _MARK: "parameters"}
    lost.append(
        "the epoch of the training, which is 0, and its optimizer; resume it with an "
        "EpochBasedRunner, as the averages are in the parameters"
    )
    return Built({"meta": meta, _STATE: {**state.averaged, **buffers}}, lost=tuple(lost))


# ---- timm ----------------------------------------------------------------------------------------

_TIMM = "state_dict_ema"


def _read_timm(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    averaged, own = state.get(_TIMM), state.get(_STATE)
    if not isinstance(averaged, Mapping):
        return None
    return AverageState(
        "timm",
        tensors_in(averaged),
        tensors_in(own) if isinstance(own, Mapping) else None,
        beside=names_beside(state, _STATE, _TIMM),
    )


def _build_timm(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    if state.steps is not None:
        lost.append(f"the number of updates ({state.steps}), which timm doesn't keep")
    tree: dict[str, Any] = {_TIMM: dict(state.averaged)}
    if state.raw is None:
        lost.append("the weights of the model (state_dict) aren't in the source")
    else:
        tree = {_STATE: dict(state.raw), **tree}
    return Built(tree, lost=tuple(lost))


LIGHTNING = Format(
    "lightning",
    "Lightning's WeightAveraging and EMAWeightAveraging, and ours",
    "state_dict, current_model_state and averaging_state",
    _read_lightning,
    _build_lightning,
)
MMENGINE = Format(
    "mmengine",
    "mmengine's EMAHook",
    "state_dict and ema_state_dict",
    _read_mmengine,
    _build_mmengine,
)
MMCV = Format(
    "mmcv",
    "EMAHook of mmcv 1.x",
    "ema_* buffers named after parameters",
    _read_mmcv,
    _build_mmcv,
)
TIMM = Format("timm", "timm's ModelEma", "state_dict_ema", _read_timm, _build_timm)
