"""Trainings of a tiny language model by transformers' Trainer, sharded between processes.

Run in each of the processes of ``tests.ranks``. On a CPU accelerate doesn't shard by FSDP, and
counts one process under DeepSpeed: it looks at the kind of device first. So what it answers there
is replaced, and nothing else; on GPUs nothing is.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import state
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    training_args,
)

from ema_fused.callbacks.huggingface import EMACallback
from ema_fused.engine.dtensors import is_sharded, local
from ema_fused.saving import checkpoints
from tests import device
from tests.digits import digits
from tests.frameworks.zero3_models import deepspeed
from tests.networks import bits

WORDS, LENGTH = 17, 16
MOMENTUM = 0.1
Tensors = dict[str, Tensor]


def model() -> LlamaForCausalLM:
    """Rows that neither 2 nor 4 processes share evenly, and tensors with fewer rows than those."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 2, "vocab_size": WORDS}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


@functools.cache
def texts(start: int, stop: int) -> list[dict[str, Tensor]]:
    """Rows of digits, 17 shades of grey as words."""
    images, _ = digits(start, stop)
    tokens = (images.flatten(1)[:, 16 : 16 + LENGTH] * 16).long()
    return [{"input_ids": row, "labels": row} for row in tokens]


@contextmanager
def accelerator_of(way: str) -> Iterator[dict[str, Any]]:
    """Arguments of a Trainer that shards this way, inside what makes accelerate do it here."""
    on_cpu = device.DEVICE == "cpu"
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "OMP_NUM_THREADS": "1"}
    environment |= {"LOCAL_WORLD_SIZE": ranks}
    arguments: dict[str, Any] = {}
    if way.startswith("fsdp"):
        config: dict[str, Any] = {
            "version": int(way[4]),
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "FULL_STATE_DICT" if way.endswith("full") else "SHARDED_STATE_DICT",
            "sync_module_states": False,  # asks for the number of a GPU
        }
        arguments = {"fsdp": True, "fsdp_config": config}
    elif way.startswith("zero"):
        deepspeed()
        arguments = {
            "bf16": way.endswith("bf16"),
            "deepspeed": {
                "zero_optimization": {
                    "stage": int(way[4]),
                    "stage3_param_persistence_threshold": 0,
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": "auto"},
            },
        }
    elif on_cpu:
        arguments = {"use_cpu": True}
    with (
        mock.patch.dict(os.environ, environment),
        warnings.catch_warnings(),
        ExitStack() as answers,
    ):
        warnings.simplefilter("ignore", FutureWarning)
        if on_cpu:
            answers.enter_context(_as_on_gpus(is_parallel="use_cpu" not in arguments))
        yield arguments


@contextmanager
def _as_on_gpus(*, is_parallel: bool) -> Iterator[None]:
    """What accelerate and transformers say of GPUs, said of the CPU."""
    kind = ("gloo", DistributedType.MULTI_GPU)
    with (
        mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"),
        mock.patch.object(state.PartialState, "_prepare_backend", lambda *_, **__: kind)
        if is_parallel
        else nullcontext(),
        mock.patch.object(training_args, "is_torch_bf16_gpu_available", lambda: True),
    ):
        yield


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Whole weights after each step, and what happened at evaluations; called before ours.

    Attributes:
        weights: of each step of the optimizer.
        averages: made of them by plain torch.
        unequal: evaluations after which a shard differed from what it was before.
        metrics: of each evaluation.
        collectives: calls inside updates.
    """

    def __init__(self, way: str) -> None:
        self.way = way
        self.weights: list[Tensors] = []
        self.averages: list[Tensors] = []
        self.unequal: list[int] = []
        self.metrics: dict[int, dict[str, float]] = {}
        self.collectives = 0
        self.before: Tensors = {}
        self.at_start: Tensors = {}
        self.callback: Any = None
        self._shards: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.before = whole_weights(self.callback._trainer.model, self.way)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        trained = self.callback._trainer.model
        new = whole_weights(trained, self.way)
        old = self.weights[-1] if self.weights else self.before
        if all(torch.equal(new[name], old[name]) for name in new):
            return  # skipped
        if not self.weights:
            self._count_collectives(self.callback.average)
        self.weights.append(new)
        before = self.averages[-1] if self.averages else self.at_start
        self.averages.append(
            {name: torch.lerp(before[name].to(one), one, MOMENTUM) for name, one in new.items()}
            if before
            else new
        )
        self._shards = shards_of(trained)

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.metrics[state.global_step] = rest["metrics"]
        now = shards_of(self.callback._trainer.model)
        if not all(map(torch.equal, now, self._shards)):
            self.unequal.append(state.global_step)

    def _count_collectives(self, average: Any) -> None:
        update = average.update_parameters

        def counted(*arguments: Any, **named: Any) -> None:
            with CommDebugMode() as mode:
                update(*arguments, **named)
            self.collectives += mode.get_total_counts()

        average.update_parameters = counted


class AtStart(TrainerCallback):  # type: ignore[misc]
    """The average as training begins; called after ours."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        recorder = self.recorder
        if int(recorder.callback.average.steps) > 0:
            recorder.at_start = whole_averages(recorder.callback, recorder.way)


def shards_of(trained: nn.Module) -> list[Tensor]:
    """The bits of what this process holds of the model."""
    held = [getattr(one, "ds_tensor", None) for one in trained.parameters()]
    return [
        bits(local(one) if piece is None else piece)
        for one, piece in zip(trained.parameters(), held, strict=True)
    ]


@torch.no_grad()
def whole_weights(trained: Any, way: str) -> Tensors:
    if way.startswith("zero3") or "masters" in way:
        return {name: master.clone() for name, master in masters(trained).items()}
    if way.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(trained, writeback=False):
            found = {name: one.clone() for name, one in trained.named_parameters()}
        return {name.replace("_fsdp_wrapped_module.", ""): one for name, one in found.items()}
    return {name: whole(one).clone() for name, one in trained.named_parameters()}


def masters(trained: Any) -> Tensors:
    """What DeepSpeed's optimizer steps on, gathered."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p) for n, p in trained.named_parameters()}


def whole(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return result.detach()


def whole_averages(callback: EMACallback, way: str) -> Tensors:
    average: Any = callback.average
    if way.startswith("fsdp1"):
        state_dict = checkpoints.averaged_state_dict(
            average, callback._trainer.model, full_state_dict=True
        )
        return {n.removeprefix("module."): t for n, t in state_dict.items() if n != "steps"}
    return {name: whole(one).clone() for name, one in average.module.named_parameters()}


def differing(ours: Tensors, theirs: Tensors) -> list[str]:
    """Names whose values aren't the same to the bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def loaded(folder: Path) -> Tensors:
    """The parameters of an exported model, in one plain process."""
    plain = LlamaForCausalLM.from_pretrained(folder)
    return {name: parameter.detach() for name, parameter in plain.named_parameters()}


def trainer_of(
    folder: Path, way: str, arguments: dict[str, Any], **more: Any
) -> tuple[Trainer, EMACallback, Recorder]:
    recorder = Recorder(way)
    averaged: dict[str, Any] = {"momentum": MOMENTUM, **more.pop("averaged", {})}
    if averaged["momentum"] is None:
        del averaged["momentum"]  # of a kind that has its own
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
    }
    trainer = Trainer(
        model=model(),
        args=TrainingArguments(str(folder), **{**options, **arguments, **more}),
        train_dataset=texts(0, 64),
        eval_dataset=texts(64, 80),
        callbacks=[recorder],
    )
    callback = EMACallback(**averaged).attach(trainer)
    trainer.add_callback(AtStart(recorder))
    recorder.callback = callback
    return trainer, callback, recorder


@torch.no_grad()
def loss_of(weights: Tensors) -> float:
    """What an evaluation with ``weights`` measures, in one plain model."""
    plain = model().eval()
    plain.load_state_dict(weights, strict=False)
    tokens = torch.stack([row["input_ids"] for row in texts(64, 80)])
    return float(plain(input_ids=tokens, labels=tokens).loss)


@contextmanager
def ended_with_its_best(
    folder: Path, way: str, *callbacks: TrainerCallback, **options: Any
) -> Iterator[tuple[Trainer, EMACallback, Recorder, dict[str, Any]]]:
    """A training that is over and has loaded its best checkpoint, and what it has then."""
    with accelerator_of(way) as arguments:
        best_by_loss = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        trainer, callback, recorder = trainer_of(folder, way, arguments, **best_by_loss, **options)
        for one in callbacks:
            trainer.add_callback(one)
        trainer.train()
        best = trainer.state.best_global_step
        facts = {
            "best": best,
            "average at best": differing(
                whole_averages(callback, way), recorder.averages[best - 1]
            ),
            "model at best": differing(
                whole_weights(trainer.model, way), recorder.weights[best - 1]
            ),
            "unequal": list(recorder.unequal),
        }
        yield trainer, callback, recorder, facts


def course(folder: Path, way: str) -> dict[str, Any]:
    """A training that ends with its best checkpoint, the first: the one of the largest loss."""
    with ended_with_its_best(folder, way, greater_is_better=True) as (*parts, facts):
        trainer, callback, recorder = parts
        average: Any = callback.average
        expected = recorder.averages
        facts |= {
            "kind": type(average).__name__,
            "wrapped": type(trainer.model_wrapped).__name__,
            "shapes": [tuple(one.shape) for one in map(local, average.module.parameters())],
            "devices": {one.device.type for one in map(local, average.module.parameters())},
            "steps": len(recorder.weights),
            "steps at best": int(average.steps),
            "collectives": recorder.collectives,
            "losses": {step: told["eval_loss"] for step, told in recorder.metrics.items()},
            "expected": {step: loss_of(expected[step - 1]) for step in recorder.metrics},
            "own": {step: loss_of(recorder.weights[step - 1]) for step in recorder.metrics},
            "averages": expected,
        }
        before = shards_of(trainer.model)
        facts["after"] = trainer.evaluate()["eval_loss"]
        facts["predicted"] = trainer.predict(texts(64, 80)).metrics["test_loss"]
        callback.save_pretrained(folder / "exported")
        facts["unchanged"] = all(map(torch.equal, before, shards_of(trainer.model)))
    return facts


def resumed(folder: Path, way: str, step: int | None, last: int = 6) -> dict[str, Any]:
    """The same training from a checkpoint on; None: from the last one that the Trainer finds."""
    checkpoint = True if step is None else str(folder / f"checkpoint-{step}")
    with (
        accelerator_of(way) as arguments,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        trainer, callback, recorder = trainer_of(
            folder, way, arguments, max_steps=last, save_strategy="no", eval_strategy="no"
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        average: Any = callback.average
        return {
            "at start": recorder.at_start,
            "steps": int(average.steps),
            "average": whole_averages(callback, way),
            "averages": recorder.averages,
            "by hand": differing(whole_averages(callback, way), recorder.averages[-1])
            if recorder.averages
            else [],
            "warned": [str(one.message) for one in warned if "no folder" in str(one.message)],
        }


def skipping(folder: Path, way: str, overflows: set[int]) -> dict[str, Any]:
    """A training with a gradient scaler; at some steps one process's loss is infinite."""
    with accelerator_of(way) as arguments:
        trainer, callback, recorder = trainer_of(
            folder,
            way,
            arguments,
            optim="sgd",
            gradient_accumulation_steps=1,
            eval_strategy="no",
            save_strategy="no",
        )
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def loss(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
            bad = trainer.state.global_step in overflows and dist.get_rank() == 1
            logits = outputs.logits[:, :-1].flatten(0, 1)
            return cross_entropy(logits, labels[:, 1:].flatten()) * (float("inf") if bad else 1.0)

        trainer.compute_loss_func = loss
        trainer.train()
        average: Any = callback.average
        return {
            "steps": int(average.steps),
            "recorded": len(recorder.weights),
            "differing": differing(whole_averages(callback, way), recorder.averages[-1]),
        }


def refused(folder: Path, way: str, averaged: dict[str, Any]) -> str:
    """What is said of such an average when training begins."""
    with accelerator_of(way) as arguments:
        trainer, _, _ = trainer_of(folder, way, arguments, averaged=averaged)
        try:
            trainer.train()
        except (TypeError, ValueError) as error:
            return str(error)
    return ""


def adapters(folder: Path) -> Tensors:
    """The averages of LoRA's tensors, of which the folder ``exported`` has files."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with_adapters = get_peft_model(model(), config)
    way = "fsdp2full"
    with (
        accelerator_of(way) as arguments,
        mock.patch.dict(globals(), model=lambda: with_adapters),
    ):
        trainer, callback, recorder = trainer_of(
            folder,
            way,
            arguments,
            averaged={"share_frozen": True},
            max_steps=2,
            eval_strategy="no",
        )
        trainer.remove_callback(recorder)
        trainer.processing_class = ByT5Tokenizer()
        trainer.train()
        callback.save_pretrained(folder / "exported")
        average: Any = callback.average
        found = {name: whole(one).clone() for name, one in average.weights.items()}
        return {name: one for name, one in found.items() if "lora" in name}
