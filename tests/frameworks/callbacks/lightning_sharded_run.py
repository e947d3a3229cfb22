"""Trainings under Lightning's strategies that shard the model, in processes of ``tests.ranks``.

On a CPU Lightning accepts ``ModelParallelStrategy`` as it is. ``FSDPOnCPU`` and ``DeepSpeedOnCPU``
leave out where the others ask for a GPU: nothing else of them is changed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies import fsdp as fabric_fsdp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import fsdp as pytorch_fsdp
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from ema_fused.callbacks import lightning as ours
from tests.sharded_models import whole_weights

IMPORTED = ("torch.distributed.checkpoint", "lightning.pytorch", __name__)
BATCHES = 4  # an epoch


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


for module in (fabric_fsdp, pytorch_fsdp):
    module._get_full_state_dict_context = _whole_states


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
    if way == "fsdp1":
        return FSDPOnCPU(
            state_dict_type="sharded" if folders else "full",
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: (
                recurse or isinstance(module, nn.Linear)
            ),
        )
    if way.startswith("zero"):
        return DeepSpeedOnCPU(
            stage=int(way[-1]), zero_allow_untested_optimizer=True, logging_batch_size_per_gpu=1
        )
    if way == "plain":
        return "ddp"
    size, parallel = dist.get_world_size(), way == "tensor_parallel"
    return ModelParallelStrategy(
        data_parallel_size=1 if parallel else size,
        tensor_parallel_size=size if parallel else 1,
        save_distributed_checkpoint=folders,
    )


class Perceptron(nn.Module):
    """Layers that don't divide evenly; one parameter has fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.last = nn.Linear(13, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("level", torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        """What is left to set where this was made on the meta device."""
        nn.init.ones_(self.scale)
        for buffer in (self.level, self.seen):
            buffer.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs).relu()) * self.scale + self.level.sum()


class Model(LightningModule):
    """Makes its layers in ``configure_model``, and shards them there where that is its task."""

    def __init__(self, way: str, meta: bool = False) -> None:
        super().__init__()
        self.way = way
        self.meta = meta
        self.network: Perceptron | None = None
        self.configured = 0

    def configure_model(self) -> None:
        self.configured += 1
        if self.network is not None:
            return
        torch.manual_seed(0)
        with torch.device("meta" if self.meta else "cpu"):
            self.network = Perceptron()
        if self.way == "tensor_parallel":
            layers = {
                "first": ColwiseParallel(output_layouts=Replicate()),
                "last": RowwiseParallel(input_layouts=Replicate()),
            }
            parallelize_module(self.network, self.device_mesh["tensor_parallel"], layers)
        if self.way == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for part in (self.network.first, self.network.last, self.network):
                fully_shard(part, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.network is not None
        self.network.level += 0.25
        self.network.seen += 1
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self._loss(batch))

    test_step = validation_step

    def _loss(self, batch: Any) -> Tensor:
        assert self.network is not None
        images, targets = batch
        return (self.network(images) - targets).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches(way: str, count: int, seed: int) -> Any:
    """Each process has its own, unless several hold parts of one layer."""
    own = 0 if way == "tensor_parallel" else dist.get_rank()
    random = torch.Generator().manual_seed(seed + own)
    made = [
        (torch.randn(6, 7, generator=random), torch.randn(6, 3, generator=random))
        for _ in range(count)
    ]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def held_out(way: str) -> Any:
    """The same everywhere, so that a loss is that of any process."""
    return batches("tensor_parallel", 1, 1000)


class Record(Callback):
    """Whole weights after each step and at the start, and the shards around validations."""

    def __init__(self, average: Any) -> None:
        self.average = average
        self.own: dict[int, dict[str, Tensor]] = {}
        self.losses: dict[int, float] = {}
        self.at_start: dict[str, Any] = {}
        self.kept = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        average = self.average._average_model
        self.at_start = {
            "own": whole(trainer.strategy.model),
            "averages": whole_of_average(average, trainer),
            "n_averaged": int(average.n_averaged),
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step not in self.own:
            self.own[trainer.global_step] = whole(trainer.strategy.model)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = local_values(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        now = local_values(pl_module)
        self.kept &= all(map(torch.equal, self.before, now))
        self.losses[trainer.global_step] = float(trainer.callback_metrics["loss"])


def local_values(model: nn.Module) -> list[Tensor]:
    held = (*model.parameters(), *model.buffers())
    return [
        (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()
        for tensor in held
    ]


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's weights, by the names of the network."""
    found = whole_weights(getattr(model, "module", model) if is_engine(model) else model)
    return {name.removeprefix("network."): tensor for name, tensor in found.items()}


def is_engine(model: nn.Module) -> bool:
    return type(model).__name__ == "DeepSpeedEngine"


def whole_of_average(average: Any, trainer: Any) -> dict[str, Tensor]:
    if isinstance(trainer.strategy, FSDPStrategy):
        with average.swapped(trainer.strategy.model):
            return whole(trainer.strategy.model)
    return whole(average.module)


class Counted(ours.EMAWeightAveraging):
    """Counts what its updates send."""

    sent = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        with CommDebugMode() as mode:
            super().on_train_batch_end(*arguments)
        self.sent += mode.get_total_counts()


def trainer(folder: Path, way: str, callbacks: list[Any], **arguments: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|deepspeed")
    folders = arguments.pop("folders", True)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": dist.get_world_size(),
        "strategy": strategy(way, folders),
        "plugins": [ServedRanks()],
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "use_distributed_sampler": False,
        "callbacks": callbacks,
    }
    return Trainer(**quiet | arguments)


def fit(folder: Path, way: str, epochs: int, resume: Path | None = None, **options: Any) -> None:
    """Trains, with a checkpoint after each epoch, and keeps what was seen in ``found.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    average = options.pop("average", None) or Counted(decay=0.75, update_every_n_steps=1)
    record = Record(average)
    saving = ModelCheckpoint(
        folder, "{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    callbacks = [average, record, saving]
    fitting = trainer(folder, way, callbacks, max_epochs=epochs, val_check_interval=2, **options)
    model = Model(way)
    fitting.fit(model, batches(way, BATCHES, 0), held_out(way), ckpt_path=resume)
    found = {
        "own": record.own,
        "at_start": record.at_start,
        "losses": record.losses,
        "kept": record.kept,
        "sent": getattr(average, "sent", None),
        "configured": model.configured,
        "end": whole(fitting.strategy.model),
        "n_averaged": int(average._average_model.n_averaged),
    }
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
