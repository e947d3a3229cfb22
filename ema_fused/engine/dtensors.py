"""DTensors in lists of tensors: each process updates the shards that it holds.

A DTensor (FSDP2's ``fully_shard``, tensor parallelism) holds its shard as a plain tensor, and so
does a :class:`~.flat_shards.FlatShard` (ZeRO-3). Averages are sharded like their sources, so an
update needs no communication.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ema_fused.engine.flat_shards import FlatShard

shard_of: Callable[[Any], Tensor] = attrgetter("_local_tensor")


def class_if_imported(module: str, name: str) -> Any:
    """A class of torch; None if its module isn't imported, as then no instance can exist."""
    return getattr(sys.modules.get(module), name, None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor or a FlatShard."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    if isinstance(tensor, FlatShard):
        return True
    dtensor = class_if_imported("torch.distributed.tensor", "DTensor")
    return dtensor is not None and isinstance(tensor, dtensor)


def local(tensor: Tensor) -> Tensor:
    """The shard of ``tensor`` in this process; the tensor itself if it isn't sharded."""
    return shard_of(tensor) if is_sharded(tensor) else tensor


def replace_local(tensor: Tensor, shard: Tensor) -> None:
    """Makes ``tensor`` use the memory of ``shard``, as assigning to ``.data`` does."""
    if is_sharded(tensor):
        # As FSDP2 does it: a DTensor's operations don't use its ``.data``.
        tensor._local_tensor = shard  # type: ignore[attr-defined]
    else:
        tensor.data = shard


def placed_as(tensor: Tensor, shard: Tensor) -> Tensor:
    """``shard`` as a DTensor with the mesh and placements of ``tensor``, if that is one.

    Of a FlatShard, as another piece of the same place.
    """
    if not is_sharded(tensor):
        return shard
    if isinstance(tensor, FlatShard):
        return tensor.with_shard(shard)
    dtensor = class_if_imported("torch.distributed.tensor", "DTensor")
    if shard.device.type not in (tensor.device_mesh.device_type, "meta"):  # type: ignore[attr-defined]
        # from_local() would move it to the mesh's device type; an offloaded average must stay.
        spec = tensor._spec  # type: ignore[attr-defined]
        meta = spec.tensor_meta._replace(dtype=shard.dtype)
        moved: Tensor = dtensor(
            shard, dataclasses.replace(spec, tensor_meta=meta), requires_grad=False
        )
        return moved
    placed: Tensor = dtensor.from_local(
        shard,
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return placed


def check_placed_alike(name: str, averaged: Tensor, source: Tensor) -> None:
    """Raises unless both sides of a pair have the same device mesh and placements.

    Raises:
        TypeError: only one of them is sharded, or a placement is Partial.
        ValueError: meshes or placements differ.
    """
    sides = is_sharded(averaged), is_sharded(source)
    if not any(sides):
        return
    if isinstance(source, FlatShard) and not isinstance(averaged, FlatShard):
        raise TypeError(
            f"{name!r} is cut into flat pieces in the model (DeepSpeed ZeRO-3) and isn't in the "
            f"average; both are expected to be cut alike. Make the average after "
            f"deepspeed.initialize: ema_fused.AveragedWeights(engine.module, ...); a checkpoint "
            f"of averages made before is loaded into that by ema_fused.checkpoints"
        )
    if not all(sides):
        which, other = ("average", "model") if sides[0] else ("model", "average")
        raise TypeError(
            f"{name!r} is a DTensor in the {which} and a plain tensor in the {other}; both are "
            f"expected to be spread alike. Shard the model first (fully_shard, parallelize_module) "
            f"and make its average then; a checkpoint of another layout is loaded by "
            f"torch.distributed.checkpoint"
        )
    one, other_side = (_placement(tensor) for tensor in (averaged, source))
    if one != other_side:
        raise ValueError(
            f"{name!r} is placed as {one[1]} on {one[0]} in the average and as {other_side[1]} on "
            f"{other_side[0]} in the model; equal placements are expected. Make a new average of "
            f"the model as it is now, and load the old one's checkpoint into it"
        )
    if any(placement.is_partial() for placement in one[1]):
        raise TypeError(
            f"{name!r} is placed as {one[1]}: its values are sums over processes that are still to "
            f"be made; redistribute it first"
        )


def _placement(tensor: Any) -> tuple[Any, tuple[Any, ...]]:
    return tensor.device_mesh, tuple(tensor.placements)


def shards_of(
    averaged: Sequence[Tensor], source: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Both lists with DTensors replaced by their shards; None if there is no pair of DTensors.

    Raises:
        ValueError, TypeError: as :func:`check_placed_alike`.
    """
    dtensor = class_if_imported("torch.distributed.tensor", "DTensor")
    if dtensor is None:
        return None
    shards, shards_of_source = list(averaged), list(source)
    found = False
    checked = set()  # most tensors of a model are placed alike
    for i, (one, other) in enumerate(zip(averaged, source, strict=True)):
        if not (isinstance(one, dtensor) and isinstance(other, dtensor)):
            continue
        found = True
        placed, its_placed = one._spec, other._spec
        seen = (placed.mesh, placed.placements, its_placed.mesh, its_placed.placements)
        if seen not in checked:
            check_placed_alike(f"pair {i}", one, other)
            checked.add(seen)
        shards[i], shards_of_source[i] = shard_of(one), shard_of(other)
    return (shards, shards_of_source) if found else None
