"""Finds plain tensors that differ between processes: of those, a file holds the first process's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ema_fused.engine.dtensors import class_if_imported, is_sharded
from ema_fused.engine.flat_shards import FlatShard
from ema_fused.modules.changes import bits_of

MODULE = "module."  # prefix of the averaged tensors in a state
# Of batch norm, which DistributedDataParallel doesn't synchronise: each process has its own.
_STATISTICS = ("running_mean", "running_var")
_SHOWN = 3


def averages_in(state: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The tensors of all states of averages in a nested state, by their paths in it."""
    found: dict[str, Any] = {}
    is_average = "steps" in state
    for name, value in state.items():
        if isinstance(value, Mapping):
            found |= averages_in(value, f"{path}{name}.")
        elif is_average and isinstance(name, str) and name.startswith(MODULE):
            found[path + name] = value
    return found


def refuse_differing(tensors: Mapping[str, Any], *, group: dist.ProcessGroup | None = None) -> None:
    """Compares the tensors that several processes hold under one name; every process calls it.

    By a checksum, in one exchange of a few bytes; only if that tells a difference, names are
    exchanged too. DTensors are left out, and so are integers and batch norm's statistics. Of a
    FlatShard that some of the processes have cut between them, others may have equal pieces alone.

    Raises:
        RuntimeError: in every process, if some differ.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    sums = _checksums(_not_spread_over_all(tensors, dist.get_world_size(group)))
    digest = hashlib.sha256(repr(sorted(sums.items())).encode()).digest()
    if len(set(_from_all(digest, group))) == 1:
        return
    first_with: dict[str, tuple[int, Any]] = {}
    differing: dict[str, list[int]] = {}
    for process, others in enumerate(_from_all(sums, group)):
        for name, checksum in others.items():
            holder, known = first_with.setdefault(name, (process, checksum))
            if checksum != known:
                differing.setdefault(name, [holder]).append(process)
    if differing:
        shown = [f"{name!r} (processes {_listed(who)})" for name, who in differing.items()]
        raise RuntimeError(
            f"{len(differing)} tensors that aren't sharded differ between the processes, and the "
            f"first process's alone would be written: {_listed(shown)}. If each process has parts "
            f"of its own (experts, say), make them DTensors, or give each its own name; if all "
            f"should be equal, look at which process updates what. check_replicas=False writes the "
            f"first process's"
        )


def _listed(items: list[Any]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more


def _from_all(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group=group)
    return answers


def _is_a_part(tensor: Tensor) -> bool:
    """Whether each process holds a part of it: of DTensors, and of what FSDP1 saves."""
    of_fsdp1 = class_if_imported("torch.distributed._shard.sharded_tensor", "ShardedTensor")
    return is_sharded(tensor) or (of_fsdp1 is not None and isinstance(tensor, of_fsdp1))


def _not_spread_over_all(tensors: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """What several processes may hold: plain tensors, and pieces that are cut between a few."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, FlatShard):
            found[name] = tensor
        elif len(tensor.cut.ranks) < processes:
            start, stop = tensor.cut.bounds(tensor.numel())
            found[f"{name}[{start}:{stop}]"] = tensor.to_local()
    return found


@torch.no_grad()
def _checksums(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Dtype, shape and the sum of the bits, read as integers, of each tensor that counts."""
    sums: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or _is_a_part(tensor) or tensor.is_meta:
            continue
        if tensor.layout != torch.strided or name.endswith(_STATISTICS):
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            total = bits_of(tensor).sum(dtype=torch.int64)
            sums.setdefault(tensor.device, {})[name] = total
    # One wait for each device, not one for each tensor.
    told: dict[str, int] = {}
    for there in sums.values():
        told |= zip(there, torch.stack([*there.values()]).tolist(), strict=True)
    return {
        name: (str(tensors[name].dtype), tuple(tensors[name].shape), total)
        for name, total in told.items()
    }
