"""Lightning's callback as its pull request 21414 would have it, in processes of ``tests.ranks``.

The pull request (open) gathers the whole model around each update, swap and copy, by
``summon_full_params`` of FSDP1, and every process keeps a whole average. Restated here.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from lightning.pytorch import callbacks as original
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused.callbacks import lightning as ours
from tests.frameworks.callbacks import lightning_sharded_run as run


class Measured:
    """What the updates of a callback do, besides averaging.

    Attributes:
        updates: how many there were.
        sent: collective calls in them.
        received: bytes that this process got from the others in them.
        held: bytes of the model's parameters that this process had in the middle of an update.
    """

    def __init__(self) -> None:
        self.updates = self.sent = self.received = self.held = 0

    @contextmanager
    def update(self) -> Iterator[None]:
        gather = dist.all_gather

        def gather_and_count(into: list[Tensor], piece: Tensor, *rest: Any, **more: Any) -> Any:
            self.received += sum(map(size, into)) - size(piece)
            return gather(into, piece, *rest, **more)

        with (
            CommDebugMode() as mode,
            mock.patch.object(dist, "all_gather", gather_and_count),
        ):
            yield
        self.updates += 1
        self.sent += mode.get_total_counts()


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def size_of(tensors: Any) -> int:
    return sum(map(size, tensors))


class Gathering(original.EMAWeightAveraging):  # type: ignore[misc]
    """The original; the whole model is gathered around each update, swap and copy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.measured = Measured()
        self._strategy: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._strategy = trainer.strategy

    @contextmanager
    def _whole(self) -> Iterator[None]:
        with FullyShardedDataParallel.summon_full_params(self._strategy.model):
            yield

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        # Here each batch is a step, and each step takes an update.
        with self.measured.update(), self._whole():
            self.measured.held = size_of(pl_module.parameters())
            super().on_train_batch_end(trainer, pl_module, *rest)

    def _swap_models(self, pl_module: nn.Module) -> None:
        with self._whole():
            super()._swap_models(pl_module)

    def _copy_average_to_current(self, pl_module: nn.Module) -> None:
        with self._whole():
            super()._copy_average_to_current(pl_module)


class Sharded(ours.EMAWeightAveraging):
    """Ours, measured alike."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.measured = Measured()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        with self.measured.update():
            super().on_train_batch_end(trainer, pl_module, *rest)
            self.measured.held = size_of(pl_module.parameters())


KINDS = {"gathering": Gathering, "sharded": Sharded}


def trained(folder: Path, way: str, kind: str) -> dict[str, Any]:
    """Trains; the averages, and what making them took in this process."""
    callback = KINDS[kind](decay=0.75)
    fitting = _fit(folder, way, callback, max_epochs=2)
    averages = callback._average_model.module.parameters()
    return {
        "averages": run.whole(fitting.strategy.model),  # where both callbacks leave them
        "kept": size_of(getattr(one, "to_local", lambda one=one: one)() for one in averages),
        "loss": float(fitting.callback_metrics["loss"]),
        **vars(callback.measured),
    }


def resumed(folder: Path, folders: bool) -> str:
    """What becomes of the gathering callback that is resumed: the error's class and text."""
    fitting = _fit(folder, "fsdp1", Gathering(decay=0.75), max_epochs=1, folders=folders)
    fitting.save_checkpoint(folder / "end.ckpt")
    callback = Gathering(decay=0.75)
    resume = {"ckpt_path": folder / "end.ckpt", "weights_only": False}
    try:
        _fit(folder, "fsdp1", callback, resume, max_epochs=2, folders=folders)
    except (KeyError, pickle.UnpicklingError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _fit(folder: Path, way: str, callback: Any, resume: Any = None, **options: Any) -> Any:
    fitting = run.trainer(folder, way, [callback], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loader = run.Model(way), run.batches(way, run.BATCHES, 0)
        fitting.fit(model, loader, run.held_out(way), **(resume or {}))
    return fitting
