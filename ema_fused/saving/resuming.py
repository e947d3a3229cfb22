"""What a checkpoint has of an average, compared with what one needs; if nothing, one begins.

All ranks agree on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ema_fused.engine.notices import warn
from ema_fused.saving import whole_files
from ema_fused.saving.first_process import by_the_first

_SHOWN = 6
# Checkpoints written without stochastic rounding have none.
_NOT_NEEDED = ("rounding_seed",)

Shapes = dict[str, tuple[int, ...] | None]
"""The shape of each tensor in a state by its path, and None for anything else."""


class Average(Protocol):
    """Any averaged model, and :class:`~ema_fused.PowerFunctionEMA`."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
    def copy_from(self, model: nn.Module) -> None: ...


def start(
    averaged: Average,
    model: nn.Module,
    where: str,
    missing: str,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Starts an average from the weights of a checkpoint without one; the first process warns.

    Args:
        model: with these weights.
        where: the checkpoint, for the warning.
        missing: what of an average isn't there, for the warning.
    """
    averaged.copy_from(model)
    if not dist.is_initialized() or dist.get_rank(group) == 0:
        warn(
            f"{where} has no average ({missing}), so one begins here, with the weights that the "
            f"model has now"
        )


def shapes_of(state: Mapping[str, Any], path: str = "") -> Shapes:
    """The shapes of what a nested state holds."""
    return dict(_leaves(state, path))


def _leaves(state: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            # FSDP1's ShardedTensor has a size() and no shape of its own.
            size = getattr(value, "size", None)
            yield f"{path}{name}", tuple(size()) if callable(size) else None


def shapes_at(folder: Path, key: str, group: dist.ProcessGroup | None) -> Shapes:
    """The shapes under ``key`` of a checkpoint of ``torch.distributed.checkpoint``.

    The first process reads them.

    Raises:
        FileNotFoundError: there is no checkpoint in the folder.
    """
    told: list[Any] = [None]
    with by_the_first(group) as is_first:
        if is_first:
            told[0] = _read(whole_files.last_whole(folder), f"{key}.")
    if dist.is_initialized():
        dist.broadcast_object_list(told, group=group, group_src=0)
    shapes: Shapes = told[0]
    return shapes


def _read(folder: Path, prefix: str) -> Shapes:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}; the path that was passed to save() is expected"
        )
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix(prefix): tuple(one.size) if hasattr(one, "size") else None
        for name, one in saved.items()
        if name.startswith(prefix)
    }


def fits_everywhere(
    wanted: Shapes, found: Shapes, where: str, *, key: str, group: dist.ProcessGroup | None
) -> bool:
    """Whether ``found`` is the average that is ``wanted``; False if there is none.

    Every process gets the same answer.

    Args:
        where: the checkpoint, for messages.
        key: where in it the average would be.

    Raises:
        RuntimeError: in every process, if ``found`` lacks something in one of them, or has it in
            another shape; or if some have an average and others none.
    """
    mine = (bool(found), _misfit(wanted, found))
    each = [mine]
    if dist.is_initialized():
        each = [mine] * dist.get_world_size(group)
        dist.all_gather_object(each, mine, group=group)
    if not any(has for has, _ in each):
        return False
    for rank, (_, misfit) in enumerate(each):
        if misfit:
            of_whom = f" in process {rank}" if len(each) > 1 else ""
            raise RuntimeError(
                f"the average in {where} ({key!r}) isn't one of this model{of_whom}: "
                f"{misfit}. Load one of this model, or "
                f"pass the key= of another; without any, call averaged.copy_from(model) and go on"
            )
    return True


def _misfit(wanted: Shapes, found: Shapes) -> str:
    missing = [name for name in wanted if name not in found and name not in _NOT_NEEDED]
    differing = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    told = [f"it lacks {_listed(missing)}"] if missing else []
    return "; ".join(told + ([_listed(differing)] if differing else []))


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
