"""Averages that are folders: of diffusers, of our callback for the Trainer, of torchtitan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ema_fused.converting.average_state import (
    MODULE,
    AverageState,
    Built,
    Format,
    Wanted,
    count_or_one,
    is_tensor,
    note_of_decay,
    number,
    tensors_in,
)
from ema_fused.converting.own_parts import parts_in
from ema_fused.converting.power_functions import with_written_one
from ema_fused.converting.shadow_lists import COUNT, SETTINGS, read_settings, settings_of
from ema_fused.merging.recognising import read_contents
from ema_fused.merging.stored_tensors import Contents

_CONFIG = "config.json"

# What a folder holds for the function that reads it, beside the contents of its weights.
_IN_FOLDER = "config.json of the folder"
_REST = "average_state.safetensors of the folder"
_RAW = "the model beside the folder"

_STATE = "average_state.safetensors"
_WEIGHTS = "model.safetensors"
_AVERAGED = "averaged"


def tree_of_folder(path: Path) -> tuple[Mapping[Any, Any], Contents] | None:
    """The weights of a folder, and what tells in it that they are an average.

    None: it is no such folder.
    """
    raw = None
    if not (path / _STATE).is_file() and (path / _AVERAGED / _STATE).is_file():
        # A checkpoint of the Trainer: the model's weights, and the average in a folder in it.
        raw = dict(read_contents(path).tree)
        path = path / _AVERAGED
    if (path / _STATE).is_file():
        contents = read_contents(path)
        rest = read_contents(path / _STATE)
        if contents.files[0].name.startswith("adapter_model"):
            # Those have PEFT's names; what is averaged is in the other file once more.
            return {_REST: rest, _RAW: raw}, rest
        names = {name: contents.tree[kept] for name, kept in contents.tied.items()}
        written = {**contents.tree, **names}
        several = with_written_one(rest, written)
        if several is not None:
            return {**several, _RAW: raw}, contents
        return {**written, _REST: rest, _RAW: raw}, contents
    config = _config_of(path)
    if COUNT in config:
        contents = read_contents(path)
        return {**contents.tree, _IN_FOLDER: config}, contents
    return None


def _config_of(path: Path) -> dict[str, Any]:
    file = path / _CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); copy it again") from error
    return config if isinstance(config, dict) else {}


def _model_config(wanted: Wanted, format: str) -> dict[str, Any]:
    """The config.json of the model, which a folder of it needs.

    Raises:
        ValueError: there is none.
    """
    config = {} if wanted.folder is None else _config_of(Path(wanted.folder))
    if not config:
        found = "none was passed" if wanted.folder is None else f"{wanted.folder} has none"
        raise ValueError(
            f"{format} needs the config.json of the model, and {found}; pass the folder of the "
            f"model by --model (folder=), as model.save_pretrained(folder) writes it"
        )
    return config


# ---- diffusers -----------------------------------------------------------------------------------


def _read_diffusers(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    config = state.get(_IN_FOLDER)
    if not isinstance(config, Mapping):
        return None
    return AverageState("diffusers", tensors_in(state), **read_settings(config))


def _build_diffusers(state: AverageState, wanted: Wanted) -> Built:
    config = _model_config(wanted, "a folder of diffusers")
    settings, lost = settings_of(state)
    config = {name: value for name, value in config.items() if name not in SETTINGS} | settings
    if state.raw is not None:
        lost.append("the weights of the model, which stay in the source")
    files = {
        "diffusion_pytorch_model.safetensors": dict(state.averaged),
        _CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n",
    }
    return Built(folder=files, lost=tuple(lost))


# ---- Our callback for the Trainer of transformers ------------------------------------------------


def _read_huggingface(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    rest = state.get(_REST)
    if not isinstance(rest, Contents):
        return None
    others = dict(rest.tree)
    if number(others.get("steps")) is None:
        raise ValueError(
            f"{rest.path} lacks the number of updates; the steps that our callback for the Trainer "
            f"has written there are expected, so copy the folder again"
        )
    averaged = {**tensors_in(state), **tensors_in(others, MODULE)}
    raw, steps = state.get(_RAW), number(others["steps"])
    return AverageState("huggingface", averaged, raw, steps=steps, more=parts_in(others))


def _build_huggingface(state: AverageState, wanted: Wanted) -> Built:
    lost = note_of_decay(state)
    steps = torch.tensor(count_or_one(state, lost))
    files: dict[str, Any] = {
        _WEIGHTS: dict(state.averaged),
        _STATE: {"steps": steps, **state.more},
    }
    if wanted.folder is not None:
        files[_CONFIG] = json.dumps(_model_config(wanted, "the folder"), indent=2) + "\n"
    else:
        lost.append("config.json, which from_pretrained needs: --model FOLDER (folder=) copies it")
    if state.raw is not None:
        lost.append("the weights of the model, which stay in the source")
    return Built(folder=files, lost=tuple(lost))


# ---- torchtitan ----------------------------------------------------------------------------------

_BEFORE, _BEHIND = "state.", ".ema_params"


def _read_torchtitan(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    averaged = {
        str(name)[len(_BEFORE) : -len(_BEHIND)]: value
        for name, value in state.items()
        if str(name).startswith(_BEFORE) and str(name).endswith(_BEHIND) and is_tensor(value)
    }
    if not averaged:
        return None
    return AverageState("torchtitan", averaged)


def _build_torchtitan(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    if state.steps is not None:
        lost.append(
            f"the number of updates ({state.steps}): torchtitan derives it from the trainer's step"
        )
    parameters = {
        f"{_BEFORE}{name}{_BEHIND}": tensor
        for name, tensor in state.averaged.items()
        if state.is_parameter(name)
    }
    left = len(state.averaged) - len(parameters)
    if left:
        lost.append(f"{left} tensors that are no parameters, which torchtitan takes from the model")
    if state.raw is not None:
        lost.append("the weights of the model, which stay in the source")
    return Built({"ema": parameters}, lost=tuple(lost))


DIFFUSERS = Format(
    "diffusers",
    "the folder of diffusers' EMAModel",
    "a config.json with optimization_step",
    _read_diffusers,
    _build_diffusers,
    "folder",
)
HUGGINGFACE = Format(
    "huggingface",
    "our callback for the Trainer of transformers",
    "a folder with average_state.safetensors",
    _read_huggingface,
    _build_huggingface,
    "folder",
)
TORCHTITAN = Format(
    "torchtitan",
    "torchtitan's EMA",
    "state.*.ema_params",
    _read_torchtitan,
    _build_torchtitan,
    "folder",
)
