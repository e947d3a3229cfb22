"""Tensors whose flat elements are cut into pieces of one size, one for each rank.

That is how DeepSpeed's ZeRO-3 spreads a parameter. The pieces aren't rows, so no DTensor describes
them; a :class:`FlatShard` does. It has the shape of the whole tensor, as a DTensor has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

_aten = torch.ops.aten
Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, and its sizes


@dataclasses.dataclass(frozen=True)
class Cut:
    """Between which processes flat elements are cut, and which piece this one has.

    Attributes:
        ranks: the processes, by their global ranks.
        piece: the index of this process's piece.
        device_type: of the device that the processes communicate on.
        group: the processes' group; None of what was unpickled.
    """

    ranks: tuple[int, ...]
    piece: int
    device_type: str = dataclasses.field(default="cpu", compare=False)
    group: Any = dataclasses.field(default=None, compare=False, repr=False)

    def bounds(self, numel: int) -> tuple[int, int]:
        """The first element of this process's piece, and the one after its last."""
        size = self.size(numel)
        return min(self.piece * size, numel), min((self.piece + 1) * size, numel)

    def size(self, numel: int) -> int:
        """The elements of a piece; the last ones have fewer, or none."""
        return -(-numel // len(self.ranks))

    def is_partial(self) -> bool:
        """For code that asks a DTensor's placements."""
        return False


class FlatShard(Tensor):
    """A process's piece of a tensor, and the shape of the whole.

    ``torch.distributed.checkpoint`` saves it under the whole shape, and so loads it on any number
    of processes, in a DTensor, or in a plain tensor. Only copies are computed with it.

    Args:
        shard: this process's piece, flat and without padding.
        shape: of the whole tensor.
        cut: how the whole is cut.

    Raises:
        ValueError: ``shard`` hasn't the elements of this process's piece.
    """

    _local_tensor: Tensor
    cut: Cut

    @staticmethod
    def __new__(
        cls, shard: Tensor, shape: Sequence[int], cut: Cut, requires_grad: bool = False
    ) -> FlatShard:
        start, stop = cut.bounds(math.prod(shape))
        if tuple(shard.shape) != (stop - start,):
            raise ValueError(
                f"a piece of shape {tuple(shard.shape)} of a tensor of shape {tuple(shape)}, cut "
                f"between {len(cut.ranks)} processes; a flat one of {stop - start} elements is "
                f"expected in process {cut.piece}"
            )
        made: FlatShard = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=shard.dtype, device=shard.device, requires_grad=requires_grad
        )
        made._local_tensor = shard
        made.cut = cut
        return made

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @property
    def device_mesh(self) -> tuple[int, ...]:
        """The processes that have a piece, where a DTensor has its mesh."""
        return self.cut.ranks

    @property
    def placements(self) -> tuple[Cut, ...]:
        """How it is cut, where a DTensor has its placements."""
        return (self.cut,)

    def to_local(self) -> Tensor:
        """This process's piece, flat."""
        return self._local_tensor

    def full_tensor(self) -> Tensor:
        """The whole tensor; every process of the group calls it."""
        numel = self.numel()
        size = max(1, self.cut.size(numel))
        if self.cut.group is None and not (dist.is_initialized() and len(self.cut.ranks) > 1):
            _refuse_without_group(self.cut)
            return self._local_tensor.clone().view(self.shape)
        piece = self._local_tensor.detach().to(self.cut.device_type)
        padded = piece.new_zeros(size)
        padded[: piece.numel()] = piece
        whole = padded.new_empty(size * len(self.cut.ranks))
        dist.all_gather(list(whole.split(size)), padded, group=self.cut.group)
        return whole[:numel].view(self.shape)

    def with_shard(self, shard: Tensor) -> FlatShard:
        """``shard`` as a piece of a tensor of this shape and cut."""
        return FlatShard(shard, self.shape, self.cut)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.copy_.default:
            return _copy(*args, **kwargs)
        if func not in _OF_ONE:
            _refuse(func)
        self, *others = args
        return self.with_shard(func(self._local_tensor, *others, **kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"FlatShard({self._local_tensor!r}, shape={tuple(self.shape)}, "
            f"piece {self.cut.piece} of {len(self.cut.ranks)})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatShard:
        if id(self) not in memo:
            with torch.no_grad():
                copied = self.detach().clone()
            copied._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        made: FlatShard = memo[id(self)]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        cut = self.cut
        place = (cut.ranks, cut.piece, cut.device_type)
        is_parameter = getattr(self, "_is_param", False)
        return _unpickled, (
            self._local_tensor.detach(),
            tuple(self.shape),
            place,
            self.requires_grad,
            is_parameter,
        )

    # As torch's wrappers: module.to() and copies look for what is inside.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_local_tensor"], (tuple(self.shape), self.cut, self.requires_grad)

    @staticmethod
    def __tensor_unflatten__(inside: dict[str, Tensor], about: Any, *_: Any) -> FlatShard:
        shape, cut, requires_grad = about
        return FlatShard(inside["_local_tensor"], shape, cut, requires_grad)

    # How torch.distributed.checkpoint asks what to write and to read (_Checkpointable).
    def _boxes(self) -> list[Box]:
        return boxes(tuple(self.shape), *self.cut.bounds(self.numel()))

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in self._boxes()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self._local_tensor),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        start = 0
        for offsets, sizes in self._boxes():
            if tuple(index.offset) == offsets:
                piece = self._local_tensor.detach()[start : start + math.prod(sizes)]
                return piece.view(sizes)
            start += math.prod(sizes)
        raise ValueError(f"no part of this process's piece begins at {tuple(index.offset)}")


_OF_ONE = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.empty_like.default,
    _aten._to_copy.default,
}


def _copy(into: Tensor, values: Tensor, non_blocking: bool = False) -> Tensor:
    """``copy_`` of a whole tensor or of an equal piece, into a piece."""
    if not isinstance(into, FlatShard):
        _refuse(_aten.copy_.default)
    if isinstance(values, FlatShard):
        if (values.cut, values.shape) != (into.cut, into.shape):
            raise ValueError(
                f"piece {values.cut.piece} of {len(values.cut.ranks)} of a tensor of shape "
                f"{tuple(values.shape)} is copied into piece {into.cut.piece} of "
                f"{len(into.cut.ranks)} of one of shape {tuple(into.shape)}; the same piece is "
                f"expected. A checkpoint of another number of processes is loaded by "
                f"ema_fused.checkpoints.load"
            )
        piece = values._local_tensor
    else:
        whole = values.expand(into.shape).reshape(-1)
        start, stop = into.cut.bounds(into.numel())
        piece = whole[start:stop]
    into._local_tensor.copy_(piece, non_blocking)
    return into


def _refuse(func: Any) -> NoReturn:
    raise NotImplementedError(
        f"{func} of a FlatShard: this process has a flat piece of the tensor alone; compute with "
        f"its piece (to_local()), or with the whole tensor (full_tensor(), which all processes of "
        f"the group call)"
    )


def _refuse_without_group(cut: Cut) -> None:
    if len(cut.ranks) > 1:
        raise RuntimeError(
            f"piece {cut.piece} of {len(cut.ranks)} can't be put together with the others: there "
            f"is no process group of them here; load a checkpoint of all pieces by "
            f"ema_fused.checkpoints.load"
        )


def _unpickled(
    shard: Tensor,
    shape: tuple[int, ...],
    place: tuple[tuple[int, ...], int, str],
    requires_grad: bool,
    is_parameter: bool,
) -> FlatShard:
    made = FlatShard(shard, shape, Cut(*place), requires_grad)
    if is_parameter:
        made._is_param = True
    return made


torch.serialization.add_safe_globals([_unpickled])


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements ``start`` to ``stop`` of a flattened tensor as boxes of the tensor, in order.

    Each is whole in all its dimensions after the first that it is longer than 1 in, so that its
    elements follow each other; there are fewer than twice as many as dimensions.
    """
    if 0 in shape:
        return [((0,) * len(shape), shape)]
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last and stop - start < inner:  # a part of one row
        within = boxes(shape[1:], start - first * inner, stop - first * inner)
        return [((first, *offsets), (1, *sizes)) for offsets, sizes in within]
    found: list[Box] = []
    if start % inner:
        found += boxes(shape, start, (first + 1) * inner)
        first += 1
    rows = stop // inner - first
    if rows:
        found.append(((first, *(0 for _ in shape[1:])), (rows, *shape[1:])))
    if stop % inner:
        found += boxes(shape, (first + rows) * inner, stop)
    return found
