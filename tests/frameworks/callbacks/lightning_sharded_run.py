"""Trainings under Lightning's strategies that shard the model, in processes of ``tests.ranks``."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as original
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    fully_shard,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from ema_fused.callbacks import lightning as ours
from tests import device
from tests.frameworks.callbacks.lightning_on_cpu import ServedRanks, strategy
from tests.networks import bits
from tests.sharded_models import whole_weights

IMPORTED = ("lightning.pytorch", "deepspeed", __name__)
BATCHES = 4  # an epoch


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
        if self.way in ("tensor_parallel", "both"):
            layers = {
                "first": ColwiseParallel(output_layouts=Replicate()),
                "last": RowwiseParallel(input_layouts=Replicate()),
            }
            parallelize_module(self.network, self.device_mesh["tensor_parallel"], layers)
        if self.way in ("fsdp2", "both"):
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
    own = {"tensor_parallel": 0, "both": dist.get_rank() // 2}.get(way, dist.get_rank())
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
        self.end: dict[str, Tensor] = {}
        self.kept = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        model = trainer.strategy.model
        # Lightning has taken it off its device by now, where NCCL can't gather pieces of ZeRO-3.
        is_away = is_partitioned(model) and device.DEVICE != "cpu"
        end = whole_of_average(self.average._average_model, trainer) if is_away else whole(model)
        self.end = {name: tensor.to(device.DEVICE) for name, tensor in end.items()}

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
        self.before = local_bits(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        now = local_bits(pl_module)
        if not trainer.sanity_checking:  # nothing is swapped there, and FSDP leaves its root whole
            self.kept &= all(map(torch.equal, self.before, now))
        self.losses[trainer.global_step] = float(trainer.callback_metrics["loss"])


def local_bits(model: nn.Module) -> list[Tensor]:
    held = (*model.parameters(), *model.buffers())
    pieces = [getattr(tensor, "ds_tensor", tensor) for tensor in held]
    return [bits(piece.to_local() if hasattr(piece, "to_local") else piece) for piece in pieces]


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's weights, by the names of the network."""
    if is_partitioned(model):
        return gathered(model.module.network)
    found = whole_weights(getattr(model, "module", model) if is_engine(model) else model)
    return {name.removeprefix("network."): tensor for name, tensor in found.items()}


def is_partitioned(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered(network: Any) -> dict[str, Tensor]:
    """What the optimizer of ZeRO-3 steps on, or the pieces of an average of it."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: (safe_get_full_fp32_param(tensor) if hasattr(tensor, "ds_id") else tensor)
        .detach()
        .clone()
        for name, tensor in network.state_dict(keep_vars=True).items()
    }


def is_engine(model: nn.Module) -> bool:
    return type(model).__name__ == "DeepSpeedEngine"


def whole_of_average(average: Any, trainer: Any) -> dict[str, Tensor]:
    if isinstance(trainer.strategy, FSDPStrategy):
        with average.swapped(trainer.strategy.model):
            return whole(trainer.strategy.model)
    return {
        name.removeprefix("network."): (
            tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        ).clone()
        for name, tensor in average.module.state_dict().items()
    }


class Counted(ours.EMAWeightAveraging):
    """Counts what its updates send."""

    sent = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        with CommDebugMode() as mode:
            super().on_train_batch_end(*arguments)
        self.sent += mode.get_total_counts()


class Saves(Callback):
    """Saves at a moment of the training, under its name."""

    def __init__(self, moment: str, folder: Path, step: int = 2, **options: Any) -> None:
        def save(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                trainer.save_checkpoint(folder / f"{moment}.ckpt", **options)

        setattr(self, moment, save)


class Fails(Callback):
    """Raises in the validation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ArithmeticError("in a validation")


class Overflows(Callback):
    """A step in which DeepSpeed's engine meets infinite gradients, as far as it tells."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.strategy.model._step_applied = False


def trainer(folder: Path, way: str, callbacks: list[Any], **arguments: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    folders = arguments.pop("folders", True)
    quiet: dict[str, Any] = {
        "accelerator": "cpu" if device.DEVICE == "cpu" else "gpu",
        "devices": dist.get_world_size(),
        "strategy": strategy(way, folders),
        "plugins": [ServedRanks()],
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "use_distributed_sampler": False,
        "val_check_interval": 2,
        "callbacks": callbacks,
    }
    return Trainer(**quiet | arguments)


def after_each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )


def fit(folder: Path, way: str, resume: Path | None = None, **options: Any) -> None:
    """Trains, with a checkpoint after each epoch, and keeps what was seen in ``found.pt``.

    Args:
        options: ``average``: the callback; ``meta``: where the model is made; ``before`` and
            ``further``: more callbacks; ``fails``: whether the training is expected to raise
            ArithmeticError. The others are the trainer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = options.pop("average", None) or Counted(decay=0.75)
    model = options.pop("model", None) or Model(way, options.pop("meta", False))
    record = Record(average)
    further, fails = options.pop("further", []), options.pop("fails", False)
    before = options.pop("before", [])
    callbacks = [*before, average, record, *further, after_each_epoch(folder)]
    fitting = trainer(folder, way, callbacks, **{"max_epochs": 3} | options)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            loader = batches(way, BATCHES, 0)
            fitting.fit(model, loader, held_out(way), ckpt_path=resume, weights_only=False)
        except ArithmeticError:
            assert fails
    found = {
        "own": record.own,
        "at_start": record.at_start,
        "losses": record.losses,
        "kept": record.kept,
        "sent": getattr(average, "sent", None),
        "configured": getattr(model, "configured", 0),
        "end": record.end or whole(fitting.strategy.model),
        "n_averaged": int(average._average_model.n_averaged),
        "averages_in": str(next(average._average_model.module.parameters()).dtype),
        "best": [getattr(one, "best_model_score", None) for one in further],
        "warned": [str(one.message) for one in warned],
    }
    torch.save(found, folder / f"found-{dist.get_rank()}.pt")
    dist.barrier()


def evaluate(way: str, path: Path, folders: bool) -> float:
    """The loss of a test with a checkpoint."""
    testing = trainer(path.parent, way, [Counted(decay=0.75)], folders=folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [scores] = testing.test(
            Model(way), held_out(way), ckpt_path=path, verbose=False, weights_only=False
        )
    return float(scores["loss"])


def theirs(folder: Path, way: str) -> str:
    """What comes of the original callback, and of resuming with it: the error's class and text."""
    for resume in (None, folder / "end.ckpt"):
        fitting = trainer(folder, way, [original.EMAWeightAveraging(decay=0.75)], max_epochs=2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fitting.fit(
                    Model(way),
                    batches(way, BATCHES, 0),
                    held_out(way),
                    ckpt_path=resume,
                    weights_only=False,
                )
                fitting.save_checkpoint(folder / "end.ckpt")
        except (AssertionError, RuntimeError, KeyError) as error:
            return f"{'resumed' if resume else 'begun'}: {type(error).__name__}: {error}"
    return "no error"


# Functions of the sort that users pass as avg_fn or multi_avg_fn.


def warmed_up(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
    decay = min(0.75, (1 + int(count)) / (10 + int(count)))
    return decay * averaged + (1 - decay) * current


def all_warmed_up(averaged: Any, current: Any, count: Tensor) -> None:
    for one, other in zip(averaged, current, strict=True):
        one.copy_(warmed_up(one, other, count))


def by_norm(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
    return averaged + (current - averaged) / (1 + current.norm())


class Manual(Model):
    """Steps at each second batch, twice."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx % 2:
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()


def fit_with(kind: str, folder: Path, way: str, **options: Any) -> None:
    """:func:`fit` with what can't be sent to another process."""
    made: dict[str, Any] = {
        "warmed up": lambda: {"average": ours.WeightAveraging(avg_fn=warmed_up)},
        "all warmed up": lambda: {"average": ours.WeightAveraging(multi_avg_fn=all_warmed_up)},
        "by norm": lambda: {"average": ours.WeightAveraging(avg_fn=by_norm)},
        "mean": lambda: {"average": ours.WeightAveraging(use_buffers=False, device="cpu")},
        "every second": lambda: {"average": Counted(decay=0.75, update_every_n_steps=2)},
        "manual": lambda: {"model": Manual(way)},
        "accumulated": lambda: {"accumulate_grad_batches": 2},
        "skipped": lambda: {"before": [Overflows()]},
        "failing": lambda: {"further": [Fails(4)], "fails": True},
        "best": lambda: {
            "further": [
                ModelCheckpoint(folder, "best", monitor="loss"),
                EarlyStopping("loss", patience=0, check_on_train_epoch_end=False),
            ]
        },
        "saving": lambda: {
            "further": [
                Saves("on_train_start", folder, 0),
                Saves("on_validation_batch_start", folder),
                Saves("on_train_batch_start", folder, weights_only=True),
                Saves("on_fit_end", folder, BATCHES),
            ]
        },
    }
    fit(folder, way, **made[kind]() | options)


def fit_without(folder: Path, way: str, folders: bool) -> None:
    """One epoch without any average."""
    fitting = trainer(folder, way, [after_each_epoch(folder)], max_epochs=1, folders=folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitting.fit(Model(way), batches(way, BATCHES, 0), held_out(way))
