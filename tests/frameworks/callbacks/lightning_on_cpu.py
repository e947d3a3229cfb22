"""Lightning's strategies that shard a model, on processes of ``tests.ranks`` without a GPU or with.

On a CPU Lightning accepts ``ModelParallelStrategy`` as it is. ``FSDPOnCPU`` and ``DeepSpeedOnCPU``
leave out where the others ask for a GPU: nothing else of them is changed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies import fsdp as fabric_fsdp
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import fsdp as pytorch_fsdp
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

from tests import device
from tests.frameworks.zero3_models import deepspeed


class ServedRanks(LightningEnvironment):
    """The processes that are there, with their process group."""

    def __init__(self) -> None:
        super().__init__()
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
        os.environ["WORLD_SIZE"] = str(dist.get_world_size())
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "29500"

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def teardown(self) -> None:
        pass


@contextmanager
def _whole_states(module: nn.Module, world_size: int, rank0_only: bool = True) -> Iterator[None]:
    """Lightning's function without ``offload_to_cpu``: torch crashes on what is there already."""
    with (
        warnings.catch_warnings(),
        FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        ),
    ):
        yield


class FSDPOnCPU(FSDPStrategy):
    """Lightning gives FSDP the index of a device, and a CPU has none."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if not any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            model = FullyShardedDataParallel(
                model,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=torch.device("cpu"),
                **self.kwargs,
            )
        return model


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning asks for GPUs, numbered from 0; DeepSpeed itself doesn't."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


def strategy(way: str, folders: bool) -> Any:
    """``folders``: whether checkpoints are folders of shards, not single files."""
    on_cpu = device.DEVICE == "cpu"
    if way == "fsdp1":
        if on_cpu:
            for module in (fabric_fsdp, pytorch_fsdp):
                module._get_full_state_dict_context = _whole_states
        return (FSDPOnCPU if on_cpu else FSDPStrategy)(
            state_dict_type="sharded" if folders else "full",
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: (
                recurse or isinstance(module, nn.Linear)
            ),
        )
    if way.startswith("zero"):
        deepspeed()
        return (DeepSpeedOnCPU if on_cpu else DeepSpeedStrategy)(
            stage=int(way[-1]), zero_allow_untested_optimizer=True, logging_batch_size_per_gpu=1
        )
    if way == "plain":
        return "ddp"
    size = dist.get_world_size()
    parallel = {"fsdp2": 1, "tensor_parallel": size, "both": 2}[way]
    return ModelParallelStrategy(
        data_parallel_size=size // parallel,
        tensor_parallel_size=parallel,
        save_distributed_checkpoint=folders,
    )
