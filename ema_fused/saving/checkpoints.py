"""Checkpoints of averages of sharded models, by ``torch.distributed.checkpoint``.

Every process calls each of these functions, as with torch's. An average can be loaded by a
different number of processes than saved it, or by one process without a process group::

    checkpoints.save({"averaged": averaged_state_dict(averaged, model)}, "run/step-1000")

    state = averaged_state_dict(averaged, model)
    checkpoints.load({"averaged": state}, "run/step-1000")
    load_averaged_state_dict(averaged, model, state)

The last three lines in one, also for a checkpoint that has no average yet: one begins with the
model's weights then::

    load_or_start(averaged, model, "run/step-1000")
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import distribute_tensor

from ema_fused.engine.dtensors import is_sharded, local
from ema_fused.engine.flat_shards import FlatShard
from ema_fused.modules.naming import plain_names, without_wrappers
from ema_fused.modules.paired_module import PairedModule
from ema_fused.modules.sharding import is_flattened
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.saving import resuming, whole_files
from ema_fused.saving.first_process import by_the_first
from ema_fused.saving.full_disk import size_of, told_if_full
from ema_fused.saving.replicas import MODULE, averages_in, refuse_differing

__all__ = [
    "averaged_state_dict",
    "exists",
    "load",
    "load_averaged_state_dict",
    "load_or_start",
    "save",
]


def save(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    process_group: dist.ProcessGroup | None = None,
    check_replicas: bool = True,
) -> None:
    """``torch.distributed.checkpoint.save``, but atomic: the directory is complete or absent.

    Every process writes its part into a directory beside ``path``; when all are done, one process
    renames it. If processes are killed, the previous checkpoint stays, or there is none.

    Args:
        state_dict: as for torch's function.
        path: the directory, on a file system shared by all processes. Replaced if it exists.
        process_group: the processes that save; None: all.
        check_replicas: refuse averages of plain tensors (not DTensors) that differ between the
            processes: the first process's would come back in all of them. Integers and batch norm's
            statistics may differ.

    Raises:
        RuntimeError: averages differ between processes, as those of experts of each process do;
            nothing is written.
        OSError: the disk is full; nothing new is left on it.
        CheckpointException: torch's, if the files can't be written for another reason.
    """
    goal = Path(path)
    if check_replicas:
        refuse_differing(averages_in(state_dict), group=process_group)
    size = size_of(state_dict)
    with told_if_full(goal, size), ExitStack() as stack:
        with by_the_first(process_group) as is_first:
            if is_first:
                stack.enter_context(whole_files.nothing_left(goal))
                whole_files.begin_beside(goal)
        with _alone_if_it_is():
            state_dict_saver.save(
                state_dict,
                storage_writer=_Writer(whole_files.beside(goal), size),
                process_group=process_group,
                no_dist=not dist.is_initialized(),
            )
        with by_the_first(process_group) as is_first:
            if is_first:
                whole_files.put_in_place(goal)


class _Writer(FileSystemWriter):
    """Says itself that the disk is full, for the other processes.

    torch sends them what was raised in each, without what has led to it.
    """

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path)
        self._size = size

    def write_data(self, *arguments: Any) -> Any:
        with told_if_full(self.path, self._size):
            return super().write_data(*arguments)


def load(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """``torch.distributed.checkpoint.load`` of what :func:`save` wrote, into ``state_dict``.

    If a program was killed while it renamed a checkpoint, the previous one is loaded. (torch reads
    the metadata of a checkpoint as a pickle: load only what you trust.)

    Args:
        state_dict: as for torch's function: the tensors to write into, sharded over any number of
            processes.
        path: the ``path`` that was passed to :func:`save`.
        process_group: the processes that load; None: all.

    Raises:
        CheckpointException: torch's, if there is no checkpoint.
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
    """Suppresses torch's warning that there is no process group: that is allowed here."""
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
    """The state of an average as ``averaged.state_dict()``, for models sharded in any way.

    Args:
        averaged: of ``model``.
        model: sharded or not; of DeepSpeed, ``engine.module``. FSDP1 restores the parameters from
            its flattened pieces.
        full_state_dict: whole tensors instead of shards; with ``cpu_offload`` only the first
            process gets them, and the others an empty dict.
        cpu_offload: return tensors on the CPU.

    Returns:
        ``steps`` and ``module.*``, with the names of the plain model; of an average that keeps more
        (``BiasCorrectedEMA``) that too.

    Raises:
        ValueError: an average of FSDP1's parameters has another dtype than the parameters: it would
            be rounded to theirs.
    """
    own = _own_buffers(averaged)
    averaged.settle()
    whole_here = not (
        full_state_dict and cpu_offload and dist.is_initialized() and dist.get_rank() > 0
    )
    # torch crashes when it is asked to offload FSDP1's tensors that are on the CPU already.
    is_there = is_flattened(model) and all(one.is_cpu for one in model.parameters())
    options = StateDictOptions(
        full_state_dict=full_state_dict, cpu_offload=cpu_offload and not is_there
    )
    if is_flattened(model):
        with _in_the_model(averaged, model):
            tensors = _copied(get_model_state_dict(model, options=options))
        not_saved = set(averaged.left_out_names)
    else:
        tensors = _state_of(averaged.module, options)
        not_saved = plain_names(averaged.shared_names)
        own = own | _beside_the_averages(averaged, options)
    tensors = {name: one for name, one in tensors.items() if name not in not_saved}
    if not whole_here:
        return {}
    return own | {MODULE + name: tensor for name, tensor in tensors.items()}


def _state_of(module: nn.Module, options: StateDictOptions) -> dict[str, Any]:
    """torch's ``get_model_state_dict``, which can't gather flat shards."""
    tensors = get_model_state_dict(module, options=options)
    if not options.full_state_dict:
        return tensors
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, FlatShard):
            whole = tensor.full_tensor()  # by all processes, whether they get it or not
            if not options.cpu_offload:
                tensors[name] = whole
            elif not dist.is_initialized() or dist.get_rank() == 0:
                tensors[name] = whole.to("cpu")
    return tensors


def load_averaged_state_dict(
    averaged: PairedModule, model: nn.Module, state_dict: dict[str, Any]
) -> None:
    """Loads the result of :func:`averaged_state_dict`: whole tensors in every process, or shards.

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
        averaged.load_state_dict(_spread_as(averaged, state_dict))
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
        if averaged.left_out_names:
            # They are the model's own, which a state must have all of.
            present = get_model_state_dict(model, options=options)
            tensors |= {name: present[name] for name in averaged.left_out_names}
        set_model_state_dict(model, tensors, options=options)
    for name, buffer in own.items():
        if name in state_dict:  # checkpoints written without stochastic rounding have no seed
            buffer.copy_(state_dict[name])


def load_or_start(
    averaged: resuming.Average,
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    key: str = "averaged",
    process_group: dist.ProcessGroup | None = None,
) -> bool:
    """Loads the average that a checkpoint has; if it has none, starts one from the model's weights.

    For a run that is resumed from a checkpoint of a time without an average: load the model first.
    The first process warns that the average begins anew. Every process calls this function, and
    all of them load, start, or raise. While it loads a file it takes the memory of one more
    average.

    Args:
        averaged: a new average of ``model``; also a :class:`~ema_fused.PowerFunctionEMA`.
        model: with the weights of the checkpoint.
        source: the ``path`` that was passed to :func:`save`, or to torch's function; or a
            checkpoint in memory, as ``torch.load`` gives it, with the average's state under
            ``key``.
        key: of the average's state in the checkpoint.
        process_group: the processes that load; None: all.

    Returns:
        Whether an average was loaded.

    Raises:
        FileNotFoundError: there is no checkpoint at this path.
        RuntimeError: the checkpoint has an average of another model, or not in all processes.
        CheckpointException: torch's, if the files can't be read.

    If an error is raised, the average is unchanged.
    """
    state = _state_apart(averaged, model)
    if isinstance(source, Mapping):
        where = "the checkpoint"
        saved = source.get(key) or {}
        found = resuming.shapes_of(saved)
    else:
        where = str(source)
        found = resuming.shapes_at(Path(source), key, process_group)
    wanted = resuming.shapes_of(state)
    if isinstance(averaged, PairedModule):  # what it shares with the model may be saved or not
        shared = plain_names(averaged.shared_names)
        wanted = {name: one for name, one in wanted.items() if without_wrappers(name) not in shared}
    if not resuming.fits_everywhere(wanted, found, where, key=key, group=process_group):
        resuming.start(averaged, model, where, f"key={key!r}", process_group)
        return False
    if isinstance(source, Mapping):
        state = {name: saved[name] for name in state if name in saved}
    else:
        # A state of other things than tensors is found by the paths inside.
        state = {
            name: one for name, one in state.items() if name in found or isinstance(one, Mapping)
        }
        load({key: state}, source, process_group=process_group)
    if isinstance(averaged, PairedModule):
        load_averaged_state_dict(averaged, model, state)
    else:
        averaged.load_state_dict(state)
    return True


def _state_apart(averaged: resuming.Average, model: nn.Module) -> dict[str, Any]:
    """A copy of the state of an average, to load into; on the devices of the model."""

    if isinstance(averaged, PairedModule) and is_flattened(model):
        return averaged_state_dict(averaged, model)  # copies
    state = averaged.state_dict()
    if any(isinstance(one, Tensor) and local(one).is_meta for one in state.values()):
        averaged.copy_from(model)  # it has no values yet that could be lost
        state = averaged.state_dict()
    with torch.no_grad():
        return {
            name: one.clone() if isinstance(one, Tensor) else copy.deepcopy(one)
            for name, one in state.items()
        }


def _own_buffers(averaged: PairedModule) -> dict[str, Tensor]:
    """Buffers that aren't the model's: ``steps``, and the seed of stochastic rounding."""
    return {name: buffer for name, buffer in averaged.named_buffers() if "." not in name}


def _beside_the_averages(averaged: PairedModule, options: StateDictOptions) -> dict[str, Any]:
    """The tensors of its other modules than the one with the averages, by their names."""
    return {
        f"{child}.{name}": tensor
        for child, part in averaged.named_children()
        if f"{child}." != MODULE
        for name, tensor in _state_of(part, options).items()
    }


def _spread_as(averaged: PairedModule, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state, with whole tensors sharded where the average's are sharded."""
    spread = dict(state_dict)
    for child, part in averaged.named_children():
        for name, own in part.state_dict().items():
            whole = spread.get(f"{child}.{name}")
            # Into a FlatShard, load_state_dict copies its piece of the whole.
            if is_sharded(own) and type(whole) is Tensor and not isinstance(own, FlatShard):
                place: Any = own
                spread[f"{child}.{name}"] = distribute_tensor(
                    whole, place.device_mesh, place.placements, src_data_rank=None
                )
    return spread


@contextmanager
def _in_the_model(averaged: PairedModule, model: nn.Module) -> Iterator[None]:
    """Puts the averages into the model for the duration of the block."""
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
    """Copies of the tensors: those of the model will soon hold its own weights again."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
