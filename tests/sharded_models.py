"""Models spread over processes in the ways torch has, for the tests of their averages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from ema_fused.engine.dtensors import local, placed_as

MIXED = ("fsdp2_mixed", "fsdp1_mixed")
WAYS = ("fsdp2", "fsdp2_kept", "tensor_parallel", "fsdp1", "ddp")


class Perceptron(nn.Module):
    """Layers that don't divide evenly; one parameter has fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.norm = nn.BatchNorm1d(13)
        self.last = nn.Linear(13, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs)).relu()) * self.scale


def perceptron(seed: int = 0) -> Perceptron:
    torch.manual_seed(seed)
    return Perceptron()


def spread(model: Perceptron, way: str) -> nn.Module:
    """``model`` over all processes; of ``MIXED`` ways linear layers compute in bfloat16."""
    dtype = torch.bfloat16 if way in MIXED else None
    way = way.removesuffix("_mixed")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if way == "ddp":
        # Otherwise a forward pass takes the buffers of process 0, averaged or not.
        return DistributedDataParallel(model, broadcast_buffers=False)
    if way == "tensor_parallel":
        layers = {
            "first": ColwiseParallel(output_layouts=Replicate()),
            "last": RowwiseParallel(input_layouts=Replicate()),
        }
        return parallelize_module(model, mesh, layers)
    if way == "fsdp2" or way == "fsdp2_kept":
        kept = way == "fsdp2_kept"
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        for layer in (model.first, model.last):
            fully_shard(layer, mesh=mesh, reshard_after_forward=not kept, mp_policy=policy)
        # Batch norm is the root's, and computes in float32.
        return fully_shard(model, mesh=mesh, reshard_after_forward=not kept)
    if way == "fsdp1":
        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(param_dtype=dtype) if dtype else None,
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: (
                recurse or isinstance(module, nn.Linear)
            ),
        )
    raise AssertionError(way)


def whole(tensor: Tensor) -> Tensor:
    """All elements of a tensor, in every process."""
    if isinstance(tensor, DTensor):
        shard, kind = local(tensor), tensor.device_mesh.device_type
        # Averages may lie in host memory; processes talk where the model is.
        there = tensor if shard.device.type == kind else placed_as(tensor, shard.to(kind))
        tensor = there.full_tensor()
    return tensor.detach().clone()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a spread model, by their plain names, in every process."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            return {
                name.replace("_fsdp_wrapped_module.", ""): tensor.detach().clone()
                for name, tensor in state.items()
            }
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """What one process trains on at a step."""
    random = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 7, generator=random), torch.randn(6, 3, generator=random)


def trainer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, way: str) -> None:
    """One step; processes that hold parts of one layer see the same batch, others their own."""
    dtype = next(model.parameters()).dtype
    images, targets = batch(step, 0 if way == "tensor_parallel" else dist.get_rank())
    inputs, targets = images.to(dtype), targets.to(dtype)
    model.train()
    optimizer.zero_grad()
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()
