"""Loops of accelerate without a Trainer, whose models FSDP or DeepSpeed shards, or DDP copies."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused import AveragedWeights
from ema_fused.callbacks.accelerate import register_average, update_average
from ema_fused.saving import averaged_state_dict, export_safetensors
from tests import device
from tests.frameworks.callbacks.sharded_trainings import (
    MOMENTUM,
    Tensors,
    accelerator_of,
    differing,
    shards_of,
    whole,
    whole_weights,
)

IN = 6


def network(rows: int) -> nn.Sequential:
    """Of the last layer's one row only the first process has something."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, rows), nn.Tanh(), nn.Linear(rows, 1))


def accelerator_and_model(
    way: str, arguments: dict[str, Any], rows: int
) -> tuple[Accelerator, Any, Any]:
    model = network(rows)
    if way == "ddp":
        accelerator = Accelerator(cpu=device.DEVICE == "cpu", gradient_accumulation_steps=2)
    elif way.startswith("fsdp"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(way[-1]),
            auto_wrap_policy="SIZE_BASED_WRAP" if way == "fsdp1" else "NO_WRAP",
            min_num_params=8,
            state_dict_type="SHARDED_STATE_DICT",
            use_orig_params=True if way == "fsdp1" else None,
        )
        accelerator = Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2)
    else:
        config = {name: one for name, one in arguments["deepspeed"].items() if one != "auto"}
        config |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
        half = {"enabled": way.endswith("fp16"), "initial_scale_power": 40, "hysteresis": 1}
        config |= {"bf16": {"enabled": False}, "fp16": half}
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    if way == "fsdp1":
        model = accelerator.prepare(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return accelerator, model, accelerator.prepare(optimizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return accelerator, *accelerator.prepare(model, optimizer)


class Loop:
    """Two batches to a step."""

    def __init__(self, way: str, arguments: dict[str, Any], rows: int = 7) -> None:
        self.way = way
        self.accelerator, self.model, self.optimizer = accelerator_and_model(way, arguments, rows)
        # Of FSDP1, the wrapper has to be seen.
        is_wrapped = way == "fsdp1"
        self.plain: Any = self.model if is_wrapped else self.accelerator.unwrap_model(self.model)
        self.average = AveragedWeights(self.model, momentum=MOMENTUM)
        self.weights: list[Tensors] = []
        self.expected: list[Tensors] = []
        self.updated: list[bool] = []
        self.collectives = 0

    def train(self, first: int, last: int) -> None:
        dtype = next(self.plain.parameters()).dtype
        for batch in range(2 * first, 2 * last):
            random = torch.Generator().manual_seed(10 * batch + dist.get_rank())
            inputs = torch.randn(4, IN, generator=random).to(dtype)
            with self.accelerator.accumulate(self.model):
                loss = self.model(inputs).float().square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                with CommDebugMode() as mode:
                    self.updated.append(update_average(self.accelerator, self.average, self.model))
                self.collectives += mode.get_total_counts()
            if self.updated[-1]:
                self._record()

    def _record(self) -> None:
        new = whole_weights(self.plain, self.way)
        old = self.expected[-1] if self.expected else new
        self.weights.append(new)
        self.expected.append({n: torch.lerp(old[n], one, MOMENTUM) for n, one in new.items()})

    def save_model(self, folder: Path) -> str:
        """Writes the averages by accelerate's ``save_model``, and returns what is refused.

        It doesn't know of FSDP1's average that it is sharded: there our own function has to do.
        """
        if self.way == "fsdp1":
            export_safetensors(self.averages(), folder)
            return ""
        if self.way == "zero3":
            with self.average.swapped(self.model):
                self.accelerator.save_model(self.model, folder)
            return ""
        self.accelerator.save_model(self.average.module, folder)
        try:
            with self.average.swapped(self.model):
                self.accelerator.save_model(self.model, folder)
        except RuntimeError as error:
            return str(error)
        return ""

    def averages(self) -> Tensors:
        weights = self.average.weights
        if self.way == "fsdp1":
            state = averaged_state_dict(self.average, self.model, full_state_dict=True)
            weights = {name.removeprefix("module."): state[name] for name in state if "." in name}
        return {name: whole(one).clone() for name, one in weights.items()}


def trained(folder: Path, way: str) -> dict[str, Any]:
    with accelerator_of(way) as arguments, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loop = Loop(way, arguments)
        register_average(loop.accelerator, loop.average, loop.model)
        loop.train(0, 2)
        loop.accelerator.save_state(str(folder / "checkpoint"))
        loop.train(2, 4)
        facts = {
            "updated": loop.updated,
            "collectives": loop.collectives,
            "by hand": differing(loop.averages(), loop.expected[-1]),
            "averages": loop.expected,
        }
        export_safetensors(loop.averages(), folder / "exported")
        before = shards_of(loop.plain)
        facts["said"] = loop.save_model(folder / "saved")
        facts["kept"] = all(map(torch.equal, before, shards_of(loop.plain)))
        if way != "fsdp1":  # whose optimizer accelerate can load into a fresh one alone
            loop.accelerator.load_state(str(folder / "checkpoint"))
            facts["loaded"] = differing(loop.averages(), loop.expected[1])
            loop.train(2, 4)
            facts["again"] = differing(loop.averages(), loop.expected[-1 - 2])
        facts["steps"] = int(loop.average.steps)
        facts["warned"] = [str(one.message) for one in warned if "no folder" in str(one.message)]
    return facts


def loaded(folder: Path, way: str, name: str) -> tuple[Tensors, list[str]]:
    """The average of that checkpoint, in any number of processes, and what was warned of."""
    with accelerator_of(way) as arguments, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loop = Loop(way, arguments)
        register_average(loop.accelerator, loop.average, loop.model, name=name)
        loop.accelerator.load_state(str(folder / "checkpoint"))
        weights = whole_weights(loop.plain, way)
        told = [str(one.message) for one in warned if "no folder" in str(one.message)]
        return loop.averages() | {f"own {name}": one for name, one in weights.items()}, told


def pickled(folder: Path) -> tuple[str, Tensor, Tensor]:
    """What is said of a sharded average that is registered as others are, and what comes of it.

    The last are this process's part of an average before ``save_state`` and after ``load_state``.
    """
    with accelerator_of("fsdp2") as arguments:
        loop = Loop("fsdp2", arguments, rows=6)  # shared evenly, so that accelerate notices nothing
        loop.train(0, 1)
        loop.accelerator.register_for_checkpointing(loop.average)
        said = ""
        try:
            loop.train(1, 2)
        except TypeError as error:
            said = str(error)
        place: Any = loop.average.weights["0.weight"]
        before = place.to_local().clone()
        loop.accelerator.save_state(str(folder / "pickled"))
        # Of the last layer's tensors the second process has nothing.
        with contextlib.suppress(RuntimeError):
            loop.accelerator.load_state(str(folder / "pickled"))
        return said, before, place.to_local().clone()


def overflowed(folder: Path) -> tuple[list[bool], int]:
    """Under DeepSpeed with a loss scale that is too large at first."""
    with accelerator_of("zero2") as arguments:
        loop = Loop("zero2fp16", arguments)
        before = whole_weights(loop.plain, "zero2")
        loop.train(0, 40)
        assert differing(before, loop.weights[0]) != []
        assert differing(loop.averages(), loop.expected[-1]) == []
        return loop.updated, int(loop.average.steps)
