"""The folder that an :class:`~ema_fused.callbacks.huggingface.EMACallback` writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.engine.memory import memory_of
from ema_fused.posthoc.power_function import PowerFunctionEMA

Average = BaseAveragedModel | PowerFunctionEMA

_STATE = "average_state.safetensors"
_TOLD = "averaged.json"
_WEIGHTS = "model*.safetensors"
_EXTRA = "_extra_state"  # of a PowerFunctionEMA: no tensor, so it goes into the file's header


def write(average: Average, model: nn.Module, folder: Path, *, sigma_rel: float | None) -> None:
    """Writes the weights for ``from_pretrained``, and the rest of the state in another file.

    A model with PEFT's adapters is written as PEFT writes it: the averaged adapters alone, for
    ``PeftModel.from_pretrained(base, folder)``. The other file then has all that is averaged once
    more, by its name in training; of the frozen base nothing is written.

    Args:
        average: the average of ``model``.
        model: the trainer's, without wrappers.
        folder: made if it isn't there.
        sigma_rel: of the average to write for ``from_pretrained``, if there are several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held, prefix = _to_write(average, sigma_rel)
    # A module of tensors alone can't write itself; the model writes these in place of its own.
    is_copy = isinstance(held, PreTrainedModel) or has_adapters(held)
    writer, weights = (held, None) if is_copy else (model, held.state_dict())
    state = average.state_dict()
    extra = state.pop(_EXTRA, None)
    written: dict[str, Tensor] = {}
    if has_adapters(writer):
        writer.save_pretrained(folder, **_given(weights))  # type: ignore[operator]
        state = _without_frozen(state, average, model)
    else:
        if isinstance(writer, PreTrainedModel):
            # With the model's own names: otherwise some architectures are saved in an older format,
            # and would have to be converted back bit for bit.
            writer.save_pretrained(folder, save_original_format=False, **_given(weights))
        else:
            tensors = _but_ties(held.state_dict(), {})
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        put_averaged_dtype(folder, held)
        names = [prefix + name for name in _names_written(folder)]
        written = {name: state.pop(name) for name in names if name in state}
    # The number of updates, and tensors that save_pretrained leaves out.
    metadata = None if extra is None else {_EXTRA: json.dumps(extra)}
    save_file(_but_ties(state, written), folder / _STATE, metadata=metadata)


def read(average: Average, model: nn.Module, folder: Path, *, sigma_rel: float | None) -> None:
    """Loads what :func:`write` wrote.

    Raises:
        RuntimeError: the files are incomplete, or don't match the average.
    """
    if not (folder / _STATE).is_file():
        raise RuntimeError(
            f"{folder} has no {_STATE}: it is incomplete, or was not written by EMACallback. "
            f"Resume from another checkpoint, or remove the folder to start a new average"
        )
    state: dict[str, Any] = load_file(folder / _STATE)
    with safe_open(folder / _STATE, framework="pt") as opened:
        extra = (opened.metadata() or {}).get(_EXTRA)
    if extra is not None:
        state[_EXTRA] = json.loads(extra)
    prefix = _to_write(average, sigma_rel)[1]
    for file in folder.glob(_WEIGHTS):
        state.update({prefix + name: tensor for name, tensor in load_file(file).items()})
    present = {
        name: tensor
        for name, tensor in average.state_dict().items()
        if name != _EXTRA  # it isn't a tensor
    }
    # Tied tensors are written once.
    by_memory = {
        memory_of(tensor): state[name] for name, tensor in present.items() if name in state
    }
    for name, tensor in present.items():
        if name not in state and memory_of(tensor) in by_memory:
            state[name] = by_memory[memory_of(tensor)]
    if has_adapters(model):
        frozen = _frozen(average, model)
        state = {name: present[name] for name in frozen if name in present} | state
    try:
        average.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"the average in {folder} doesn't match the model in training: {error}"
        ) from error


def write_all_but_weights(model: nn.Module, folder: Path) -> None:
    """Writes what ``save_pretrained`` writes beside weights: configurations, code."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, state_dict={}, save_original_format=False)
        for file in folder.glob(_WEIGHTS):
            file.unlink()


def put_averaged_dtype(folder: Path, averaged: nn.Module) -> None:
    """Writes into the configuration the dtype of the averages, to which ``from_pretrained`` goes.

    The model has written its own. Of several it is the widest: tensors that are left out of the
    average may have 16 bits.
    """
    file = folder / "config.json"
    dtypes = [one.dtype for one in averaged.parameters() if one.is_floating_point()]
    if file.is_file() and dtypes:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["dtype"] = str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe(
    average: Average, folder: Path, *, step: int, processes: int, shards: str | None
) -> None:
    """Writes a small file that says what the folder holds, for people and programs.

    Args:
        step: the trainer's.
        shards: the folder of each process's part; None if any process has the whole average.
    """
    momentum = getattr(average, "momentum", None)
    weights = sorted(file.name for file in folder.glob("*.safetensors") if file.name != _STATE)
    told = {
        "about": (
            "This folder holds AVERAGED weights. Those of the training itself are in the folder "
            "around it."
        ),
        "for from_pretrained": weights or "nothing: EMACallback.save_pretrained() writes them",
        "for resuming": shards or _STATE,
        "kind": type(average).__name__,
        "steps": int(cast(Any, average.steps)),
        "momentum": momentum if isinstance(momentum, float | int | None) else repr(momentum),
        "global_step": step,
        "processes": processes,
    }
    text = json.dumps(told, indent=2) + "\n"
    (folder / _TOLD).write_text(text, encoding="utf-8")


def adapters_in(model: nn.Module) -> set[str]:
    """The names of PEFT's adapters in ``model``."""
    return set(getattr(model, "peft_config", ())) if has_adapters(model) else set()


def _to_write(average: Average, sigma_rel: float | None) -> tuple[nn.Module, str]:
    """The module that is written for ``from_pretrained``, and its prefix in the average's state."""
    if isinstance(average, BaseAveragedModel):
        return average.module, "module."
    number = 0 if sigma_rel is None else average.sigma_rel.index(sigma_rel)
    return average.averages[number], f"averages.{number}."


def has_adapters(module: nn.Module) -> bool:
    """Whether it is PEFT's ``PeftModel``, or a model of transformers with PEFT's adapters in it."""
    if isinstance(module, PreTrainedModel):
        return bool(getattr(module, "_hf_peft_config_loaded", False))
    return hasattr(module, "peft_config") and hasattr(module, "save_pretrained")


def _given(weights: dict[str, Tensor] | None) -> dict[str, Any]:
    return {} if weights is None else {"state_dict": weights}


def _frozen(average: Average, model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters of ``model`` by their names in the average's state."""
    prefixes = ["module."]
    if isinstance(average, PowerFunctionEMA):
        prefixes = [f"averages.{number}." for number in range(len(average.averages))]
    return {
        prefix + name: parameter
        for prefix in prefixes
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }


def _without_frozen(
    state: dict[str, Tensor], average: Average, model: nn.Module
) -> dict[str, Tensor]:
    """``state`` without what equals the model's frozen parameters, as it always has."""
    frozen = _frozen(average, model)
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in frozen
        or not torch.equal(tensor, frozen[name].detach().to(tensor.device, tensor.dtype))
    }


def _names_written(folder: Path) -> list[str]:
    """The names of the tensors that ``save_pretrained`` wrote."""
    names: list[str] = []
    for file in folder.glob(_WEIGHTS):
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return names


def _but_ties(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` for safetensors: contiguous, each tied one once, none tied to ``others``."""
    seen = {memory_of(tensor) for tensor in others.values()}
    kept = {}
    for name, tensor in tensors.items():
        if memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            kept[name] = tensor.contiguous()
    return kept
