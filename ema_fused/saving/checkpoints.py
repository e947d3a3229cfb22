"""Checkpoints of averages that are spread over processes, by ``torch.distributed.checkpoint``.

Every process calls each of these functions, as those of torch. Saved by some number of processes,
an average is loaded by any other, or by one that has none around it::

    checkpoints.save({"averaged": averaged_state_dict(averaged, model)}, "run/step-1000")

    state = averaged_state_dict(averaged, model)
    checkpoints.load({"averaged": state}, "run/step-1000")
    load_averaged_state_dict(averaged, model, state)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import distribute_tensor

from ema_fused.engine.dtensors import is_sharded
from ema_fused.modules.paired_module import PairedModule
from ema_fused.modules.sharding import is_flattened
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.saving import whole_files
from ema_fused.saving.first_process import by_the_first

__all__ = ["averaged_state_dict", "exists", "load", "load_averaged_state_dict", "save"]

MODULE = "module."  # before the names of averaged tensors in a state


def save(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """``torch.distributed.checkpoint.save`` into a directory that is whole or not there.

    Every process writes its part beside ``path``; when all are done one renames the directory. So
    processes that are killed leave the checkpoint that was there before, or none.

    Args:
        state_dict: as there.
        path: the directory, on a file system that all processes see. Replaced if it is there.
        process_group: the processes that save; None: all.
    """
    goal = Path(path)
    with by_the_first(process_group) as is_first:
        if is_first:
            whole_files.begin_beside(goal)
    with _alone_if_it_is():
        state_dict_saver.save(
            state_dict,
            checkpoint_id=whole_files.beside(goal),
            process_group=process_group,
            no_dist=not dist.is_initialized(),
        )
    with by_the_first(process_group) as is_first:
        if is_first:
            whole_files.put_in_place(goal)


def load(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """``torch.distributed.checkpoint.load`` of what :func:`save` wrote, into ``state_dict``.

    Where a program was killed while it gave a checkpoint its name, the one before is loaded.
    (torch reads the metadata of a checkpoint as a pickle: load only what you trust.)

    Args:
        state_dict: as there: the tensors to write into, of any processes' layout.
        path: as :func:`save` was given it.
        process_group: the processes that load; None: all.

    Raises:
        CheckpointException: torch's, where there is none.
    """
    with _alone_if_it_is():
        state_dict_loader.load(
            state_dict,
            checkpoint_id=whole_files.last_whole(Path(path)),
            process_group=process_group,
            no_dist=not dist.is_initialized(),
        )


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`load` finds a checkpoint at ``path``."""
    return whole_files.last_whole(Path(path)).is_dir()


@contextmanager
def _alone_if_it_is() -> Iterator[None]:
    """Without torch's warning that there is no process group: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def averaged_state_dict(
    averaged: PairedModule,
    model: nn.Module,
    *,
    full_state_dict: bool = False,
    cpu_offload: bool = False,
) -> dict[str, Any]:
    """The state of an average as ``averaged.state_dict()`` gives it, however the model is spread.

    Args:
        averaged: of ``model``.
        model: sharded or not. FSDP1's is asked to put its flat pieces together.
        full_state_dict: whole tensors instead of shards; with ``cpu_offload`` in the first process
            alone, and empty in the others.
        cpu_offload: on the CPU.

    Returns:
        ``steps`` and ``module.*``, names as the plain model's.

    Raises:
        ValueError: an average of FSDP1's parameters is kept in another dtype than they have: they
            would be rounded on their way.
    """
    own = _own_buffers(averaged)
    averaged.settle()
    # torch crashes where it is asked to bring FSDP1's tensors from the CPU to the CPU.
    is_there = is_flattened(model) and all(one.is_cpu for one in model.parameters())
    options = StateDictOptions(
        full_state_dict=full_state_dict, cpu_offload=cpu_offload and not is_there
    )
    if is_flattened(model):
        with _in_the_model(averaged, model):
            tensors = _copied(get_model_state_dict(model, options=options))
    else:
        tensors = get_model_state_dict(averaged.module, options=options)
        for name in averaged.shared_names:
            tensors.pop(name, None)
    if full_state_dict and cpu_offload and dist.is_initialized() and dist.get_rank() > 0:
        return {}
    return own | {MODULE + name: tensor for name, tensor in tensors.items()}


def load_averaged_state_dict(
    averaged: PairedModule, model: nn.Module, state_dict: dict[str, Any]
) -> None:
    """Takes over what :func:`averaged_state_dict` gave; whole tensors in every process, or shards.

    Raises:
        RuntimeError: names or shapes don't match.
        ValueError: as :func:`averaged_state_dict`.
    """
    tensors = {
        name.removeprefix(MODULE): tensor
        for name, tensor in state_dict.items()
        if name.startswith(MODULE)
    }
    if not is_flattened(model):
        averaged.load_state_dict(_spread_as(averaged, tensors, state_dict))
        return
    is_whole = all(type(tensor) is Tensor for tensor in tensors.values())
    options = StateDictOptions(full_state_dict=is_whole)
    own = _own_buffers(averaged)
    missing = own.keys() - state_dict.keys() - {"rounding_seed"}
    if missing:
        raise RuntimeError(
            f"missing in the state of the average: {', '.join(sorted(missing))}; a state that "
            f"averaged_state_dict() gave is expected"
        )
    with _in_the_model(averaged, model):
        set_model_state_dict(model, tensors, options=options)
    for name, buffer in own.items():
        if name in state_dict:  # checkpoints written without stochastic rounding have no seed
            buffer.copy_(state_dict[name])


def _own_buffers(averaged: PairedModule) -> dict[str, Tensor]:
    """``steps``, and the seed of stochastic rounding: what isn't of the model."""
    return {name: buffer for name, buffer in averaged.named_buffers() if "." not in name}


def _spread_as(
    averaged: PairedModule, tensors: dict[str, Any], state_dict: dict[str, Any]
) -> dict[str, Any]:
    """The state with shards where it has whole tensors and the average has shards."""
    spread = dict(state_dict)
    for name, own in averaged.module.state_dict().items():
        whole = tensors.get(name)
        if is_sharded(own) and type(whole) is Tensor:
            place: Any = own
            spread[MODULE + name] = distribute_tensor(
                whole, place.device_mesh, place.placements, src_data_rank=None
            )
    return spread


@contextmanager
def _in_the_model(averaged: PairedModule, model: nn.Module) -> Iterator[None]:
    """The averages in the model's place, for the length of the block."""
    refuse_while_swapped("a checkpoint of averages was made or loaded", averaged, model)
    exchange = averaged.exchange_with(model)
    if exchange.overwrites:
        name = exchange.overwrites[0]
        raise ValueError(
            f"{name!r} has another dtype in the average than in the model, and FSDP1 would round "
            f"it to the model's; leave averaged_dtype out with FSDP1, or use fully_shard (FSDP2)"
        )
    exchange.put_in()
    try:
        yield
    finally:
        exchange.take_out()


@torch.no_grad()
def _copied(tensors: dict[str, Any]) -> dict[str, Any]:
    """What is the model's own memory holds other values soon."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
