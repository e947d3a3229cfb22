"""Trainings under Lightning's strategies that are killed, in processes of ``tests.ranks``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.strategies import fsdp as fabric_fsdp
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import fsdp as pytorch_fsdp
from lightning.pytorch.strategies import model_parallel as pytorch_model_parallel
from torch import Tensor, nn

from ema_fused.callbacks import lightning as ours
from tests.frameworks.callbacks import lightning_sharded_run as run
from tests.processes import die

STEP = 7  # in which a process dies: two steps after the checkpoint of the first epoch
DIED = "died.json"


def die_in_a_save(folder: Path, way: str, name: str, time: int) -> None:
    """Trains until a checkpoint is written, in which each process ends after its shards.

    Args:
        name: of the checkpoint.
        time: which of the saves of this name.
    """

    save = fabric_fsdp._distributed_checkpoint_save

    saved: list[str] = []

    def save_and_die(state: Any, path: Path) -> None:
        save(state, path)
        saved.append(path.name)
        if saved.count(name) == time:
            die()

    module = pytorch_fsdp if way == "fsdp1" else pytorch_model_parallel
    module._distributed_checkpoint_save = save_and_die
    again = [run.Saves("on_train_batch_start", folder, step) for step in (3, 6)]
    run.fit(folder, way, further=again)


class Dies(Callback):
    """The second of the processes ends within a step, and leaves what it had done until then.

    Args:
        moment: ``backward``: after some layers; ``between``: the weights are new, the averages
            aren't; ``update``: of the averages, some are new.
    """

    def __init__(self, moment: str, folder: Path) -> None:
        self.moment = moment
        self.folder = folder
        self.average: Any = ours.WeightAveraging(avg_fn=self._averaged)
        self.trainer: Any = None
        self.calls = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.trainer, self.calls = trainer, 0
        if self._is_here("backward", steps=STEP - 1):
            pl_module.network.first.register_forward_hook(self._die_at_its_gradient)

    def _die_at_its_gradient(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: self._die())

    def on_train_batch_end(self, *_: Any) -> None:
        if self._is_here("between", steps=STEP):
            self._die()

    def _averaged(self, averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
        self.calls += 1
        if self.trainer is not None and self.calls == 3 and self._is_here("update", steps=STEP):
            self._die()
        return run.warmed_up(averaged, current, count)

    def _is_here(self, moment: str, *, steps: int) -> bool:
        is_moment = self.moment == moment and self.trainer.global_step == steps
        return is_moment and dist.get_rank() == 1

    def _die(self) -> None:
        facts = {
            "steps": self.trainer.global_step,
            "averaged": int(self.average._average_model.n_averaged),
            "calls": self.calls,
        }
        (self.folder / DIED).write_text(json.dumps(facts))
        die()


def die_in_a_step(folder: Path, way: str, moment: str) -> None:
    """Trains until a process ends in the middle of a step."""
    folder.mkdir(exist_ok=True)
    dies = Dies(moment, folder)
    run.fit(folder, way, average=dies.average, before=[dies])


def fit_warmed_up(folder: Path, way: str, resume: Path | None = None) -> None:
    """The training of :func:`die_in_a_step`, in which nobody dies."""
    run.fit_with("warmed up", folder, way, resume=resume)
