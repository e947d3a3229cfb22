"""Checkpoints of one network, written by several ranks that have spread it in different ways."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    FileSystemWriter,
    HuggingFaceStorageWriter,
    state_dict_saver,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ema_fused import AveragedWeights
from ema_fused.callbacks.shards import write_shards
from ema_fused.engine.flat_shards import Cut, FlatShard
from ema_fused.saving import checkpoints
from tests.sharded_models import whole

SEEDS = (1, 2, 3)
MOMENTUM = 0.25


class Net(nn.Module):
    """Tensors of 8, 7, 3, 1 and no rows: of some, several of four ranks have none."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(6, 8)
        self.uneven = nn.Linear(8, 7)
        self.few = nn.Linear(7, 3)
        self.one = nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.ones(1))
        self.kernel = nn.Parameter(torch.ones(5, 4, 3))
        self.nothing = nn.Parameter(torch.empty(0, 3))


def net(seed: int, dtype: torch.dtype) -> Net:
    """The same in each process."""
    torch.manual_seed(seed)
    made = Net()
    with torch.no_grad():
        for tensor in (*made.parameters(), made.norm.running_mean, made.norm.running_var):
            assert tensor is not None
            tensor.normal_()
    return made.to(dtype)


def _on_dimension_1(parameter: nn.Parameter) -> Shard:
    last = parameter.ndim - 1
    return Shard(last if parameter.shape[last] % dist.get_world_size() == 0 else 0)


def _in_a_grid(model: nn.Module) -> nn.Module:
    """Each matrix in blocks of rows and columns, uneven ones too."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    for module in model.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            first: Placement = Shard(1) if own.ndim > 1 else Replicate()
            spread = distribute_tensor(own.detach(), mesh, [first, Shard(0)])
            module.register_parameter(name, nn.Parameter(spread))
    return model


def _in_two_dimensions(model: nn.Module) -> nn.Module:
    """FSDP2 of a tensor-parallel model."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "rows"))
    layers = {"even": ColwiseParallel(), "uneven": RowwiseParallel(), "few": ColwiseParallel()}
    parallelize_module(model, mesh["rows"], layers)
    return fully_shard(model, mesh=mesh["data"])


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (_count(),))),
    "replicated_fsdp2": lambda model: fully_shard(
        model, mesh=init_device_mesh("cpu", (2, _count() // 2), mesh_dim_names=("copies", "rows"))
    ),
    "dimension_1": lambda model: fully_shard(
        model,
        mesh=init_device_mesh("cpu", (_count(),)),
        shard_placement_fn=_on_dimension_1,
    ),
    "grid": _in_a_grid,
    "two_dimensions": _in_two_dimensions,
}


def _count() -> int:
    return dist.get_world_size()


def of_torch(folder: Path, way: str, dtype: torch.dtype) -> None:
    """``model`` by torch's own function, a checkpoint a seed."""
    for seed in SEEDS:
        model = WAYS[way](net(seed, dtype))
        state = {"model": get_model_state_dict(model), "step": 100 * seed}
        state_dict_saver.save(state, checkpoint_id=folder / f"step-{100 * seed}")


def averaged(way: str, dtype: torch.dtype) -> tuple[nn.Module, AveragedWeights]:
    """The weights of seed 2, and their float32 average with those of seed 1 before them."""
    model = WAYS[way](net(1, dtype))
    average = AveragedWeights(model, MOMENTUM, averaged_dtype=torch.float32)
    average.update_parameters(model)
    later = net(2, dtype).state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.numel() and not hasattr(tensor, "placements"):
                tensor.copy_(later[name])
            elif hasattr(tensor, "placements"):
                place: Any = tensor
                spread = distribute_tensor(
                    later[name], place.device_mesh, place.placements, src_data_rank=None
                )
                place.to_local().copy_(spread.to_local())
    average.update_parameters(model)
    return model, average


def of_ours(folder: Path, way: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The average beside the weights, and as callbacks write it; returns the whole averages."""
    model, average = averaged(way, dtype)
    state = checkpoints.averaged_state_dict(average, model)
    both = {"model": get_model_state_dict(model), "averaged": state}
    checkpoints.save(both, folder / "both")
    write_shards(average, model, folder / "checkpoint-2" / "averaged" / "shards")
    return {name: whole(tensor) for name, tensor in average.weights.items()}


def of_a_training(folder: Path) -> None:
    """What a training keeps beside its weights, two threads a rank, and a file a tensor."""
    model = WAYS["fsdp2"](net(1, torch.float32))
    optimizer = torch.optim.AdamW(model.parameters())
    own, others = get_state_dict(model, optimizer)
    state = {
        "app": {"model": own, "optim": others},
        "rng": {"numpy": np.random.get_state(), "python": random.getstate()},
        "data": pickle.dumps([1]),
        "where": Path("x"),
    }
    writer = FileSystemWriter(folder / "training", single_file_per_rank=False, thread_count=2)
    state_dict_saver.save(state, storage_writer=writer)


def of_hugging_face(folder: Path) -> None:
    """safetensors files of each rank's parts; and files of torch.save with its DTensors."""
    for seed in SEEDS:
        own = get_model_state_dict(WAYS["grid"](net(seed, torch.float32)))
        into = str(folder / "ranks" / f"step-{seed}")
        writer = HuggingFaceStorageWriter(into, save_distributed=True)
        state_dict_saver.save(own, storage_writer=writer)
    (folder / "saved").mkdir(exist_ok=True)
    torch.save(own, folder / "saved" / f"rank_{dist.get_rank()}.pt")


def of_flat_pieces(folder: Path) -> None:
    """As of ZeRO-3: flat pieces, each of several boxes."""
    ranks = tuple(range(_count()))
    cut = Cut(ranks, dist.get_rank())
    pieces = {}
    for name, tensor in net(1, torch.float32).named_parameters():
        start, stop = cut.bounds(tensor.numel())
        piece = tensor.detach().flatten()[start:stop].clone()
        pieces[name] = FlatShard(piece, tuple(tensor.shape), cut)
    checkpoints.save({"averaged": pieces}, folder / "flat")
    (folder / "pieces").mkdir(exist_ok=True)
    torch.save(pieces, folder / "pieces" / f"rank_{dist.get_rank()}.pt")


def everything(folder: Path, dtypes: list[torch.dtype]) -> dict[str, dict[str, Tensor]]:
    """Writes all of them; returns the whole averages by way and dtype."""
    averages = {}
    for way in WAYS:
        if _count() == 2 and way != "fsdp2":
            continue
        for dtype in dtypes:
            inside = folder / f"{way}-{str(dtype).removeprefix('torch.')}"
            of_torch(inside, way, dtype)
            averages[inside.name] = of_ours(inside / "ours", way, dtype)
    if _count() > 2:
        of_a_training(folder)
        of_hugging_face(folder)
        of_flat_pieces(folder)
    return averages


def loaded(folder: Path, way: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole weights of a model that has loaded ``model`` of a folder, spread in this way."""
    model = WAYS[way](net(0, dtype))
    state = {"model": get_model_state_dict(model)}
    checkpoints.load(state, folder)
    return {name: whole(tensor) for name, tensor in state["model"].items()}
