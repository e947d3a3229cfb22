"""Trainings of :mod:`sharded_trainings` that end before their last step."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback

from ema_fused.callbacks import huggingface
from tests.frameworks.callbacks.sharded_trainings import (
    accelerator_of,
    ended_with_its_best,
    loss_of,
    trainer_of,
)
from tests.processes import die

STEPS_AT_MOST = 16  # of a training that stops early


def stopped_early(folder: Path, way: str) -> dict[str, Any]:
    """A training that ends when its evaluations, one after each step, have got worse twice."""
    every_step = {"max_steps": STEPS_AT_MOST, "eval_steps": 1, "save_steps": 1}
    stops = EarlyStoppingCallback(early_stopping_patience=2)
    training = ended_with_its_best(
        folder, way, stops, learning_rate=0.3, save_total_limit=1, **every_step
    )
    with training as (trainer, _, recorder, facts):
        return facts | {
            "stopped": trainer.state.global_step,
            "losses": [told["eval_loss"] for told in recorder.metrics.values()],
            "expected": [loss_of(average) for average in recorder.averages],
            "own": [loss_of(weights) for weights in recorder.weights],
        }


# What is called when one of the processes is killed, by what it is the middle of.
_CALLED = {
    "save": (huggingface, "write_shards"),
    "step": (importlib.import_module("torch.optim.adam"), "adam"),
    "update": (torch, "_foreach_lerp_"),
}


def killed(folder: Path, way: str, moment: str) -> None:
    """As :func:`course`; one of the processes is killed, and leaves the file ``died``.

    Args:
        moment: "save": of the second checkpoint, after four steps; "step", the fifth one of the
            optimizer, or "update", the fifth one of the average: half of its tensors are changed.
    """
    averaged = {"backend": "foreach"} if moment == "update" else {}
    place, name = _CALLED[moment]
    with accelerator_of(way) as arguments:
        trainer, _, _ = trainer_of(folder, way, arguments, averaged=averaged)
        called = getattr(place, name)

        def dying(*arguments: Any, **named: Any) -> None:
            if trainer.state.global_step != 4 or dist.get_rank() != 1:
                called(*arguments, **named)
                return
            if moment != "save":
                called(*map(_first_half, arguments), **named)
            (folder / "died").touch()
            die()

        with mock.patch.object(place, name, dying):
            trainer.train()


def _first_half(argument: Any) -> Any:
    return argument[: (len(argument) + 1) // 2] if isinstance(argument, list) else argument
