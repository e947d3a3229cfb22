"""Models whose parameters are sharded by FSDP1, FSDP2 or ZeRO-3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.engine.dtensors import class_if_imported, local, placed_as
from ema_fused.engine.host_memory import host_memory
from ema_fused.engine.memory import is_wrapper, starts_in_one_place
from ema_fused.modules.partitions import (
    drop_gathered_partitions,
    is_partitioned,
    partitioned_parameters,
)

Device = torch.device | str | int | None


def drop_gathered(model: nn.Module) -> None:
    """Frees parameters that FSDP has gathered; a forward pass without a backward leaves them so.

    Otherwise the module would hold plain tensors instead of shards (FSDP2), and a later forward
    pass would use the gathered, outdated values after the shards have been written.
    """
    drop_gathered_in(parts_of_fsdp(model))


def parts_of_fsdp(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` whose parameters FSDP gathers."""
    names = ("FSDPModule", "FullyShardedDataParallel")
    found = [class_if_imported("torch.distributed.fsdp", name) for name in names]
    classes = tuple(cls for cls in found if cls is not None)
    return [part for part in model.modules() if isinstance(part, classes)] if classes else []


def drop_gathered_in(parts: list[nn.Module]) -> None:
    """:func:`drop_gathered` of modules that :func:`parts_of_fsdp` found."""
    for module in parts:
        reshard = getattr(module, "reshard", None)
        if reshard is not None:  # FSDP2
            reshard()
            continue
        handle: Any = getattr(module, "_handle", None)
        # Before the first forward pass nothing has been allocated to gather into.
        if handle is not None and hasattr(handle.flat_param, "_full_param_padded"):
            # FSDP1 has no public function for this: summon_full_params() would gather everything.
            handle._free_unsharded_flat_param()


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP1, which flattens parameters, wraps any part of ``model``."""
    fsdp1 = class_if_imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    return fsdp1 is not None and any(isinstance(part, fsdp1) for part in model.modules())


def refuse_deepcopy(model: nn.Module) -> None:
    """Raises TypeError if FSDP wraps any part of ``model``: such a model can't be deep-copied."""
    fsdp2 = class_if_imported("torch.distributed.fsdp", "FSDPModule")
    if is_flattened(model) or (
        fsdp2 is not None and any(isinstance(part, fsdp2) for part in model.modules())
    ):
        raise TypeError(
            f"{type(model).__name__} is sharded by FSDP, which can't be deep-copied; keep its "
            f"average without a copy of the module: ema_fused.AveragedWeights(model, ...)"
        )


class Gathered:
    """What FSDP and ZeRO-3 may have gathered of ``model``, found once."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = parts_of_fsdp(model)
        self._partitioned = partitioned_parameters(model)

    def drop(self) -> None:
        """Frees it; the next pass gathers anew, from the shards as they are then."""
        drop_gathered_in(self._parts)
        drop_gathered_partitions(self._partitioned)


def refuse_partitioned(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a parameter whose elements DeepSpeed's ZeRO-3 has partitioned."""
    if is_partitioned(tensor):
        raise TypeError(
            f"{name!r} is partitioned by DeepSpeed ZeRO-3, so this process has a piece of it, and "
            f"a copy of the module would have none; keep the average without a copy: "
            f"ema_fused.AveragedWeights(engine.module, ...)"
        )


def converted(
    tensor: Tensor, device: Device, dtype: torch.dtype | None, *, pinned: bool = False
) -> Tensor:
    """A copy of ``tensor`` on ``device`` and in ``dtype`` (None: unchanged), sharded as it is.

    Args:
        pinned: in host memory, pinned if CUDA is available.
    """
    source = local(tensor.detach())
    if not pinned:
        if not is_wrapper(source):
            return placed_as(tensor, source.to(device=device, dtype=dtype, copy=True))
        # A class may refuse ``copy``, or leave it unheard.
        moved = source if device is None and dtype is None else source.to(device, dtype)
        return moved.clone() if starts_in_one_place(moved, source) else moved
    copied = host_memory(source, dtype)
    return placed_as(tensor, copied.copy_(source) if not source.is_meta else copied.to("meta"))
