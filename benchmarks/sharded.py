"""Averages of DTensors, as trainers of sharded models update them, in a group of one process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ema_fused
from ema_fused.bench.contenders import (
    FLOAT32,
    OURS,
    WEIGHT,
    Buffers,
    Contender,
    Group,
    check,
    plan_of,
    random_tensors,
)
from ema_fused.bench.measuring import CannotMeasureError, Case, limit_bytes
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import Clock

MODELS = ("100x1024", "resnet50")
ON_GPU = ("resnet50",)  # too large for its cache


def sharded_cases(models: Sequence[Shapes], clock: Clock) -> Iterator[Case]:
    """A case for each model, float32."""
    for shapes in models:
        held = shapes.elements * (FLOAT32.bytes_held() + 3 * 4)  # averages of the host, and casts
        needed = held + limit_bytes(shapes.elements * FLOAT32.bytes_moved())
        make = partial(_made, shapes, clock.device)
        yield Case("sharded", "DTensors", "DTensors", shapes, FLOAT32, needed, make)


def _made(shapes: Shapes, device: torch.device) -> Group:
    """The group of one process lives as long as the contenders.

    Raises:
        CannotMeasureError: torch has no gloo, on a GPU no NCCL, or this process is in a group
            already.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not (dist.is_available() and dist.is_backend_available(backend)):
        raise CannotMeasureError(f"torch.distributed with {backend} isn't there")
    if dist.is_initialized():
        raise CannotMeasureError("this process is in a group already")
    store: Any = importlib.import_module("torch._C._distributed_c10d").HashStore()
    dist.init_process_group(backend, rank=0, world_size=1, store=store)
    try:
        return _contenders(random_tensors(shapes.shapes, torch.float32, device, seed=0))
    except BaseException:
        dist.destroy_process_group()
        raise


def _contenders(values: list[Tensor]) -> Group:
    averages = [torch.zeros_like(value) for value in values]
    on_shards = Buffers(averages, values, [WEIGHT] * len(values))
    on_host = Buffers(
        [torch.zeros_like(value, device="cpu") for value in values], values, on_shards.weights
    )
    averaged, source = _as_dtensors(averages), _as_dtensors(values)
    plan = plan_of(averages, values)

    def contender(name: str, update: Callable[..., None], *, exact: bool = True) -> Contender:
        return Contender(name, [partial(update, averaged, source)], [on_shards], exact)

    contenders = [
        Contender(f"{OURS} Plan of the shards", [partial(plan.lerp_, WEIGHT)], [on_shards]),
        contender(f"{OURS}.lerp_ of DTensors", _ours),
        contender("foreach lerp of DTensors (torchtitan)", foreach_lerp),
        contender("foreach mul and add of DTensors (DINOv3)", _foreach_mul_add, exact=False),
        contender("to_local(), foreach mul and add (cosmos-predict2)", _local_foreach, exact=False),
        contender("loop: mul_().add_() of DTensors (NeMo Automodel)", loop, exact=False),
        Contender(
            "to_local().float().cpu(), foreach lerp on the host (FastVideo)",
            [partial(_on_host, on_host.averaged, source)],
            [on_host],
            exact=values[0].device.type == "cpu",  # the host's foreach and a GPU's may round apart
        ),
    ]
    bytes_moved = FLOAT32.bytes_moved() * sum(value.numel() for value in values)
    return Group(
        contenders,
        bytes_moved,
        partial(check, contenders),
        [plan.launches],
        close=dist.destroy_process_group,
    )


def _as_dtensors(shards: list[Tensor]) -> list[Any]:
    """DTensors whose only shard each is one of these tensors, not a copy."""
    mesh = importlib.import_module("torch.distributed.device_mesh")
    sharding: Any = importlib.import_module("torch.distributed.tensor")
    devices = mesh.init_device_mesh(shards[0].device.type, (1,))
    # A scalar has no dimension to be sharded.
    return [
        sharding.DTensor.from_local(
            shard, devices, [sharding.Shard(0) if shard.dim() else sharding.Replicate()]
        )
        for shard in shards
    ]


def _ours(averaged: list[Any], source: list[Any]) -> None:
    ema_fused.lerp_(averaged, source, WEIGHT)


# torchtitan: one foreach call on the DTensors as they are.
def foreach_lerp(averaged: list[Any], source: list[Any]) -> None:
    torch._foreach_lerp_(averaged, source, WEIGHT)


# DINOv3: the teacher is scaled, then the student added; two foreach calls on DTensors.
def _foreach_mul_add(averaged: list[Any], source: list[Any]) -> None:
    torch._foreach_mul_(averaged, 1 - WEIGHT)
    torch._foreach_add_(averaged, source, alpha=WEIGHT)


# cosmos-predict2: the shards are taken out at each update, then foreach on plain tensors.
def _local_foreach(averaged: list[Any], source: list[Any]) -> None:
    _foreach_mul_add(
        [average.to_local() for average in averaged], [value.to_local() for value in source]
    )


# NeMo Automodel: parameter by parameter, two operations on DTensors each.
def loop(averaged: list[Any], source: list[Any]) -> None:
    for average, value in zip(averaged, source, strict=True):
        average.mul_(1 - WEIGHT).add_(value, alpha=WEIGHT)


# FastVideo: float32 averages of the shards in the host's memory.
def _on_host(averages: list[Tensor], source: list[Any]) -> None:
    shards = [value.to_local().float().cpu() for value in source]
    torch._foreach_lerp_(averages, shards, WEIGHT)
