"""Whether all parameters are finite, as a flag on their device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn.utils import get_total_norm

from ema_fused.engine.arguments import as_flag
from ema_fused.engine.dtensors import is_sharded, shard_of

_SMALL = 2**14  # elements: a call takes longer than to copy so few


@torch.no_grad()
def nonfinite_flag(parameters: Iterable[Tensor], found_inf: Tensor | None = None) -> Tensor:
    """1 if an element of ``parameters`` is infinite or NaN, or ``found_inf`` is set; else 0.

    Reads every floating-point element once. Doesn't synchronise with the device of the parameters;
    if they are on several, the flag is on that of the first. The processes that share DTensors have
    one flag, by an all-reduce of it.

    Returns:
        A 0-dim float32 tensor.
    """
    meshes: dict[Any, None] = {}
    on_host: list[Tensor] = []
    small: dict[torch.dtype, list[Tensor]] = {}
    elsewhere: list[Tensor] = []
    for tensor in parameters:
        if is_sharded(tensor):
            meshes[tensor.device_mesh] = None  # type: ignore[attr-defined]
            tensor = shard_of(tensor)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
            continue
        if tensor.itemsize == 1:  # float8 has no reductions
            tensor = tensor.float()
        if tensor.device.type != "cpu":
            elsewhere.append(tensor)
        elif tensor.numel() > _SMALL:
            on_host.append(tensor)
        else:
            small.setdefault(tensor.dtype, []).append(tensor)
    # The largest and smallest elements are finite if all are; powers could overflow. A CPU takes a
    # sixth of the time for aminmax() that it takes for the norm.
    on_host += map(_flatten_dense_tensors, small.values())
    bounds = [get_total_norm(elsewhere, math.inf)] if elsewhere else []
    bounds += [bound for tensor in on_host for bound in torch.aminmax(tensor)]
    if found_inf is not None:
        bounds.append(torch.where(as_flag(found_inf).reshape(()) != 0, math.nan, 0.0))
    device = bounds[0].device if bounds else None
    is_finite = torch.stack([bound.to(device) for bound in bounds] or [torch.zeros(())]).isfinite()
    flag = (~is_finite.all()).float()
    for mesh in meshes:
        there = flag.to(mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(there, dist.ReduceOp.MAX, mesh.get_group(dimension))
        flag = there.to(flag.device)
    return flag
