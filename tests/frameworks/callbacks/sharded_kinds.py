"""Trainings by transformers' Trainer, sharded: averages of some tensors, of masters, and BEMA.

Run in each of the processes of ``tests.ranks``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from ema_fused import BiasCorrectedEMA
from ema_fused.callbacks.huggingface import EMACallback
from ema_fused.callbacks.trl import BEMACallback
from tests.frameworks.callbacks.sharded_trainings import (
    MOMENTUM,
    AtStart,
    Tensors,
    accelerator_of,
    differing,
    loss_of,
    masters,
    shards_of,
    texts,
    trainer_of,
    whole,
    whole_averages,
)

STEPS, SAVED = 4, 2
POWERS = {"ema_power": 0.3, "bias_power": 0.7, "lag": 3}
CHOICES: dict[str, dict[str, Any]] = {
    "include": {"include": r"mlp|lm_head"},
    "exclude": {"exclude": r"mlp|embed_tokens"},
    "bema": {"average": BiasCorrectedEMA, **POWERS},
    "bema of some": {"average": BiasCorrectedEMA, **POWERS, "exclude": r"self_attn"},
    "source": {"source": masters},
}
LEFT_OUT = {"include": ("self_attn", "norm", "embed"), "exclude": ("mlp", "embed_tokens")}
LEFT_OUT |= {"bema": (), "bema of some": ("self_attn",), "source": ()}


def is_left_out(choice: str, name: str) -> bool:
    return any(part in name for part in LEFT_OUT[choice])


def expected(choice: str, weights: list[Tensors]) -> tuple[list[Tensors], list[Tensors]]:
    """By plain torch, after each step: what is averaged, and what BEMA reads out."""
    averages, corrected = [dict(weights[0])], [dict(weights[0])]
    for step, new in enumerate(weights[1:], 1):
        made, read = {}, {}
        for name, now in new.items():
            if is_left_out(choice, name):
                made[name] = read[name] = now
            elif "bema" in choice:
                reached = POWERS["lag"] + float(step)
                momentum = reached ** -POWERS["ema_power"]
                made[name] = averages[-1][name].mul(1 - momentum).add_(now, alpha=momentum)
                read[name] = (
                    made[name] + (now - weights[0][name]) * reached ** -POWERS["bias_power"]
                )
            else:
                made[name] = torch.lerp(averages[-1][name], now, MOMENTUM)
        averages.append(made)
        corrected.append(read)
    return averages, corrected


def averaged_alone(choice: str, tensors: Tensors) -> Tensors:
    return {name: one for name, one in tensors.items() if not is_left_out(choice, name)}


def problems(choice: str, callback: EMACallback, way: str, weights: list[Tensors]) -> Any:
    """Names of tensors that aren't what they are expected to be, by what they are of."""
    average: Any = callback.average
    averages, corrected = expected(choice, weights)
    found = {"averages": _differing(choice, whole_averages(callback, way), averages[-1])}
    if "bema" in choice:
        read = {name: whole(one) for name, one in average.corrected(_model(callback)).items()}
        found["corrected"] = _differing(choice, read, corrected[-1])
    own = [name for name in average.left_out_names if not is_left_out(choice, name)]
    kept = [name for name in averages[-1] if name not in average.left_out_names]
    return found | {"left out": own + [name for name in kept if is_left_out(choice, name)]}


def _differing(choice: str, found: Tensors, wanted: Tensors) -> list[str]:
    return differing(
        averaged_alone(choice, {name: found[name] for name in wanted}),
        averaged_alone(choice, wanted),
    )


def _model(callback: EMACallback) -> Any:
    return callback._trainer.model


def course(folder: Path, way: str, choice: str) -> dict[str, Any]:
    """A training with a checkpoint halfway, and what is wrong with its average."""
    with accelerator_of(way) as arguments:
        trainer, callback, recorder = trainer_of(
            folder, way, arguments, averaged=_averaged(choice), max_steps=STEPS
        )
        trainer.train()
        averages, corrected = expected(choice, recorder.weights)
        callback.save_pretrained(folder / "exported")
        return {
            "problems": problems(choice, callback, way, recorder.weights),
            "collectives": recorder.collectives,
            "unequal": recorder.unequal,
            "read out": _read_out(callback) if "bema" in choice else None,
            "corrected": loss_of(corrected[-1]),
            "losses": {step: told["eval_loss"] for step, told in recorder.metrics.items()},
            "expected": {step: loss_of(averages[step - 1]) for step in recorder.metrics},
            "weights": recorder.weights,
            "averages": averages,
        }


@torch.no_grad()
def _read_out(callback: EMACallback) -> tuple[float, bool]:
    """The loss inside ``swapped_corrected``; whether the model has its own shards afterwards."""
    average: Any = callback.average
    trained = _model(callback).eval()
    before = shards_of(trained)
    tokens = torch.stack([row["input_ids"] for row in texts(64, 80)])
    with average.swapped_corrected(trained):
        loss = float(trained(input_ids=tokens, labels=tokens).loss)
    return loss, all(map(torch.equal, before, shards_of(trained)))


def resumed(folder: Path, way: str, choice: str, before: list[Tensors]) -> dict[str, Any]:
    """The same from its checkpoint on."""
    with accelerator_of(way) as arguments, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="torch|accelerate|deepspeed|transformers")
        trainer, callback, recorder = trainer_of(
            folder,
            way,
            arguments,
            averaged=_averaged(choice),
            max_steps=STEPS,
            save_strategy="no",
            eval_strategy="no",
        )
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
        average: Any = callback.average
        return {
            "steps": int(average.steps),
            "problems": problems(choice, callback, way, before[:SAVED] + recorder.weights),
        }


def _averaged(choice: str) -> dict[str, Any]:
    return {"momentum": None if "bema" in choice else MOMENTUM} | CHOICES[choice]


def refused(folder: Path, way: str) -> str:
    """What is said of TRL's callback, which has a copy of the model, when training begins."""
    with accelerator_of(way) as arguments:
        trainer, callback, recorder = trainer_of(folder, way, arguments)
        for one in (callback, recorder, AtStart):
            trainer.remove_callback(one)
        trainer.add_callback(BEMACallback())
        try:
            trainer.train()
        except TypeError as error:
            return str(error)
    return ""
