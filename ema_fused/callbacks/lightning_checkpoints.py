"""Averages of shards in Lightning's checkpoints.

Where the strategy writes one file, the file has the original callback's keys: the averages under
``state_dict``, the model's own weights under ``current_model_state``, and ``averaging_state``.

Where it writes a folder, the averages are what the folder has of the model, and the own weights are
in a folder ``current_model_state`` in it. DeepSpeed's folder has the own weights, which belong to
the optimizer's, and ``averaged_model_state`` the averages. ``weight_averaging.json`` says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from ema_fused.callbacks.lightning_originals import is_deepspeed
from ema_fused.callbacks.lightning_shards import ShardAverage
from ema_fused.modules.sharding import is_flattened
from ema_fused.saving import checkpoints
from ema_fused.saving.first_process import by_the_first
from ema_fused.saving.replicas import MODULE

__all__ = [
    "AVERAGES",
    "NOTE",
    "OWN",
    "load_averages",
    "put_averages_in",
    "saving",
    "writes_folders",
]

OWN = "current_model_state"
AVERAGES = "averaged_model_state"
NOTE = "weight_averaging.json"
HERE = "."

_WRITTEN_LAST = "meta.pt"  # by Lightning, which takes a folder without it for no checkpoint


class HasShards(Protocol):
    """A callback with the average of a sharded model."""

    own_state: dict[str, Any] | None

    def average_and_model(self) -> tuple[ShardAverage, nn.Module] | None:
        """The average and the model, as its strategy wraps it; None if the model is the average."""

    def holding(self, *, averages: bool) -> AbstractContextManager[None]:
        """A block in which the model holds the averages, or its own weights."""


@contextmanager
def saving(
    callback: HasShards, strategy: Any, filepath: Any, *, global_step: int, weights_only: bool
) -> Iterator[None]:
    """A block in which the strategy saves, with the averages in what it saves."""
    path = Path(strategy.broadcast(filepath))
    found = callback.average_and_model()
    # The folders of the averaged weights and of the own ones, seen from the checkpoint's.
    note: dict[str, Any] = {"global_step": global_step, "averaged": HERE, "own": None}
    if found is None:
        _prepare_folder(strategy, path, note | {"averaged": None, "own": HERE})
        yield
        return
    average, model = found
    if is_deepspeed(strategy):
        # ZeRO-3 saves what its optimizer steps on, which a swap leaves alone.
        swaps = weights_only and not strategy.zero_stage_3
        if not swaps:
            note |= {"averaged": AVERAGES, "own": HERE}
        _prepare_folder(strategy, path, note)
        with callback.holding(averages=swaps):
            if not swaps:
                state = {"averaged": checkpoints.averaged_state_dict(average, model)}
                checkpoints.save(state, path / AVERAGES, check_replicas=False)
            yield
        return
    with callback.holding(averages=False):
        own = strategy.lightning_module_state_dict()
        averaged = _averaged_state(callback, strategy, average, model, own)
        if not weights_only and writes_folders(strategy):
            _prepare_folder(strategy, path, note | {"own": OWN})
            state = {"model": get_model_state_dict(model)}
            checkpoints.save(state, path / OWN, check_replicas=False)
        else:
            _prepare_folder(strategy, path, note)
        strategy.lightning_module_state_dict = lambda: averaged
        callback.own_state = own
        try:
            yield
        finally:
            callback.own_state = None
            del strategy.lightning_module_state_dict


def _averaged_state(
    callback: HasShards, strategy: Any, average: ShardAverage, model: nn.Module, own: dict[str, Any]
) -> dict[str, Any]:
    """``own``, as the strategy makes it of the model, with the averages in it."""
    whole = not writes_folders(strategy)
    there, here = (next(module.parameters()).device for module in (average.module, model))
    # Shards are gathered on the model's device only.
    if is_flattened(model) or (whole and there != here):
        with callback.holding(averages=True):
            state = strategy.lightning_module_state_dict()
            # What isn't copied to host memory by the strategy is the model's own tensors.
            return _copied(state) if here.type == "cpu" else state
    options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
    average.settle()
    state = get_model_state_dict(average.module, options=options)
    return {name: state.get(name, value) for name, value in own.items()}


@torch.no_grad()
def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }


def writes_folders(strategy: Any) -> bool:
    """Whether a checkpoint of ``strategy`` is a folder with parts of each process."""
    return (
        is_deepspeed(strategy)
        or getattr(strategy, "_state_dict_type", None) == "sharded"
        or getattr(strategy, "_save_distributed_checkpoint", False)
    )


def _prepare_folder(strategy: Any, path: Path, note: dict[str, Any]) -> None:
    """Makes the folder of a checkpoint, if the strategy writes one, with a note in it.

    An older checkpoint of this name ends here: one half overwritten must not pass for a whole one.
    """
    if not writes_folders(strategy):
        return
    with by_the_first(None) as is_first:
        if is_first:
            if path.is_file():
                path.unlink()
            path.mkdir(parents=True, exist_ok=True)
            (path / _WRITTEN_LAST).unlink(missing_ok=True)
            for part in (OWN, AVERAGES):
                shutil.rmtree(path / part, ignore_errors=True)
            (path / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def load_averages(
    average: ShardAverage,
    model: nn.Module,
    strategy: Any,
    path: Path,
    checkpoint: dict[str, Any],
) -> None:
    """Loads a checkpoint's average, and the model's own weights, when the strategy has loaded it.

    Except with DeepSpeed the strategy has put the averages into the model.

    Args:
        path: of the checkpoint.
        checkpoint: the rest of it, as the strategy has left it to callbacks.

    Raises:
        RuntimeError: the folder holds weights of several steps.
    """
    note = _note_in(path, checkpoint)
    if note.get("averaged", HERE) is None:  # none had been made, or the model was the average
        average.copy_from(model)
    elif is_deepspeed(strategy):
        _load_folder_of_averages(average, model, path)
    elif path.is_dir():
        _load_average_of_folder(average, model, strategy, path)
        _load_own_of_folder(model, path / OWN)
    else:
        _load_average_of_file(average, model, path)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, checkpoint[OWN], options=options)
    average.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])


def put_averages_in(model: nn.Module, average: ShardAverage, path: Path) -> None:
    """Puts the averages of a checkpoint of DeepSpeed into a model that isn't trained."""
    if (path / AVERAGES).is_dir():
        _load_folder_of_averages(average, model, path)
        average.copy_to(model)


def _note_in(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = path / NOTE
    if not file.is_file():
        return {}
    note: dict[str, Any] = json.loads(file.read_text())
    if note["global_step"] != checkpoint["global_step"]:
        raise RuntimeError(
            f"{path} has averages of step {note['global_step']} and a training of step "
            f"{checkpoint['global_step']}: it was being overwritten when the run ended. Resume "
            f"from another checkpoint"
        )
    return note


def _load_folder_of_averages(average: ShardAverage, model: nn.Module, path: Path) -> None:
    state = checkpoints.averaged_state_dict(average, model)
    checkpoints.load({"averaged": state}, path / AVERAGES)
    checkpoints.load_averaged_state_dict(average, model, state)


def _load_average_of_folder(
    average: ShardAverage, model: nn.Module, strategy: Any, path: Path
) -> None:
    average.copy_from(model)
    if average.exchange_with(model).overwrites:  # the model has rounded them
        key = "model" if getattr(strategy, "_state_dict_type", None) else "state_dict"
        state = average.module.state_dict()
        checkpoints.load({key: state}, path)
        average.module.load_state_dict(state)


def _load_own_of_folder(model: nn.Module, path: Path) -> None:
    state = get_model_state_dict(model)
    checkpoints.load({"model": state}, path)
    set_model_state_dict(model, state)


def _load_average_of_file(average: ShardAverage, model: nn.Module, path: Path) -> None:
    average.copy_from(model)
    if average.exchange_with(model).overwrites:
        saved = torch.load(path, mmap=True, map_location="cpu")
        state = {MODULE + name: tensor for name, tensor in saved["state_dict"].items()}
        state["steps"] = average.steps
        checkpoints.load_averaged_state_dict(average, model, state)
