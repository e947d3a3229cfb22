"""Parameters that DeepSpeed's ZeRO-3 partitions: where each rank's pieces are.

A partitioned parameter is an empty tensor between passes. Its ``ds_tensor`` is this rank's piece of
the flat elements, which passes gather; the optimizer steps on a float32 copy of it, in one flat
tensor for many parameters. ``deepspeed`` itself is never imported: who has such parameters has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from ema_fused.engine.flat_shards import Cut, FlatShard

_MARKS = "deepspeed.runtime.zero.partition_parameters"  # what partitions parameters


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned ``tensor``; it may be gathered at the moment."""
    return getattr(tensor, "ds_tensor", None) is not None


def partitioned_parameters(model: nn.Module) -> list[Any]:
    """The parameters of ``model`` that ZeRO-3 has partitioned."""
    if _MARKS not in sys.modules:
        return []
    return [parameter for parameter in model.parameters() if is_partitioned(parameter)]


def drop_gathered_partitions(partitioned: Sequence[Any]) -> None:
    """Frees what is gathered of these parameters, the persistent ones too.

    Without communication: the next pass gathers them anew. Works also after a pass that raised.
    """
    optimizers: dict[int, Any] = {}
    without: list[Any] = []
    for parameter in partitioned:
        optimizer = _optimizer_of(parameter)
        if optimizer is None:
            without.append(parameter)
        else:
            optimizers[id(optimizer)] = optimizer
    for optimizer in optimizers.values():
        optimizer.empty_partition_cache()
    for parameter in without:
        parameter.ds_active_sub_modules.clear()
        parameter.partition()
    for parameter in partitioned:
        # A second piece inside a node (zero_hpz_partition_size) is made anew of the first.
        parameter.ds_secondary_tensor = None


class _Masters(NamedTuple):
    """A flat tensor that an optimizer steps on."""

    optimizer: Any
    group: int
    flat: Tensor
    address: int

    def has_moved(self) -> bool:
        flats = self.optimizer.fp32_partitioned_groups_flat
        if self.group >= len(flats):
            return True
        return flats[self.group] is not self.flat or self.flat.data_ptr() != self.address


class _Piece(NamedTuple):
    """A parameter's own piece."""

    parameter: Any
    piece: Tensor
    address: int
    trains: bool

    def has_moved(self) -> bool:
        return (
            self.parameter.ds_tensor is not self.piece
            or self.piece.data_ptr() != self.address
            or self.parameter.requires_grad != self.trains
        )


class Partitions:
    """Finds the pieces of partitioned parameters, each parameter's once.

    Args:
        found: where what was found is noted, to see later whether it has moved.
        for_passes: find the pieces that passes gather, even where the optimizer has others.
    """

    def __init__(self, found: list[Any], *, for_passes: bool) -> None:
        self._found = found
        self._for_passes = for_passes
        self._seen: dict[int, FlatShard] = {}
        self._noted: set[tuple[int, int]] = set()

    def find(self, name: str, parameter: Any, *, for_passes: bool = False) -> Tensor:
        """This rank's piece of ``parameter``, in the memory where it is kept.

        Args:
            for_passes: as the constructor's, for this one.

        Raises:
            TypeError: it is kept on a disk, or quantized.
        """
        if id(parameter) not in self._seen:
            reads = for_passes or self._for_passes
            piece = None if reads else self._master_of(name, parameter)
            if piece is None:
                piece = self._own_piece(name, parameter)
            self._seen[id(parameter)] = _as_parameter(piece, parameter)
        return self._seen[id(parameter)]

    def _master_of(self, name: str, parameter: Any) -> Tensor | None:
        """The piece that the optimizer steps on; None if it has none."""
        optimizer = _optimizer_of(parameter)
        if optimizer is None or not parameter.requires_grad:
            return None
        place = optimizer.grad_position.get(optimizer.get_param_id(parameter))
        if place is None:
            return None
        group, start, numel = place
        flat = optimizer.fp32_partitioned_groups_flat[group]
        if flat.numel() < start + numel:
            _refuse_on_disk(name)
        if (id(optimizer), group) not in self._noted:
            self._noted.add((id(optimizer), group))
            self._found.append(_Masters(optimizer, group, flat, flat.data_ptr()))
        piece: Tensor = flat.detach().narrow(0, start, numel)
        return piece

    def _own_piece(self, name: str, parameter: Any) -> Tensor:
        piece: Tensor = parameter.ds_tensor
        if hasattr(piece, "ds_quant_scale"):
            raise TypeError(
                f"{name!r} is quantized by DeepSpeed ZeRO-3 (zero_quantized_nontrainable_weights), "
                f"and quantized values can't be averaged or swapped; leave that option out"
            )
        if piece.numel() < parameter.ds_tensor.ds_numel:
            _refuse_on_disk(name)
        # An optimizer that comes later moves the pieces that it trains into memory of its own.
        self._found.append(_Piece(parameter, piece, piece.data_ptr(), parameter.requires_grad))
        return piece.detach()


def _as_parameter(piece: Tensor, parameter: Any) -> Any:
    group = parameter.ds_process_group
    ranks = dist.get_process_group_ranks(group)
    cut = Cut(tuple(ranks), dist.get_rank(group), parameter.device.type, group)
    start, stop = cut.bounds(parameter.ds_numel)
    shard = FlatShard(piece[: stop - start], parameter.ds_shape, cut)  # without padding
    return nn.Parameter(shard, requires_grad=parameter.requires_grad)


def _optimizer_of(parameter: Any) -> Any:
    """DeepSpeed's optimizer that trains ``parameter``; None before deepspeed.initialize."""
    return getattr(parameter, "_z3_optimizer", None)


def _refuse_on_disk(name: str) -> None:
    raise TypeError(
        f"{name!r} is kept on a disk by DeepSpeed ZeRO-3 (offload to nvme) and isn't in memory "
        f"between steps; offload to the host instead: device: cpu"
    )
