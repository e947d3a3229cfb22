"""Models that DeepSpeed's ZeRO-3 partitions between processes, and their training."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_fused import AveragedWeights
from ema_fused.engine.dtensors import is_sharded
from ema_fused.saving import checkpoints
from ema_fused.saving.checkpoints import averaged_state_dict, load_averaged_state_dict
from tests import device
from tests.networks import bits
from tests.processes import die

IN, HIDDEN, OUT = 33, 16, 7


class Network(nn.Module):
    """One parameter is tied, two are frozen, some are cut unevenly, one has a single element."""

    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN)
        self.tied = nn.Linear(IN, HIDDEN)
        self.tied.weight = self.first.weight
        self.norm = nn.LayerNorm(HIDDEN)
        self.register_buffer("batches", torch.tensor(0))
        self.frozen = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, OUT)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen.requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
        hidden = torch.relu(self.first(batch)) + self.tied(batch)
        hidden = self.frozen(self.norm(hidden))
        result: Tensor = self.last(torch.relu(hidden)) * self.scale
        return result


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


@functools.cache
def deepspeed() -> Any:
    """The package, told that there is no GPU where the device is the CPU."""
    if device.DEVICE == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    if device.DEVICE == "cpu":
        # DeepSpeed refuses float16 on processors that are slow with it.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    # Or it compiles its own collectives first, for half a minute ...
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ... and imports torch's compiler, for an optimizer that nobody asks for here.
    with mock.patch.object(torch, "compile", lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon
    return deepspeed


def configuration(
    *,
    stage: int = 3,
    bf16: bool = True,
    trains: bool = True,
    accumulation: int = 1,
    universal: bool = False,
    **zero: Any,
) -> dict[str, Any]:
    """DeepSpeed's; ``universal`` are the checkpoints it loads, ``zero`` its options of ZeRO."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 40} | zero
    adam = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    return {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": bf16},
        "checkpoint": {"load_universal": universal},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # that of torch serves where weights are offloaded
    } | ({"optimizer": adam} if trains else {})


def partitioned(model: nn.Module, **options: Any) -> Any:
    """DeepSpeed's engine around ``model``; parameters of up to 40 elements persist."""
    engine, *_ = deepspeed().initialize(model=model, config=configuration(**options))
    return engine


def train(engine: Any, step: int) -> None:
    """One step, in each process on samples of its own."""
    random = torch.Generator().manual_seed(100 * step + dist.get_rank())
    batch = torch.randn(6, IN, generator=random)
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    engine.train()
    engine.backward(engine(batch.to(device.DEVICE, dtype)).float().square().mean())
    engine.step()


def outputs(model: Any) -> Tensor:
    """What an engine or a plain model says at the moment; an engine gathers as ever."""
    if isinstance(model, Network):
        model.to(device.DEVICE)
    batch = torch.randn(5, IN, generator=torch.Generator().manual_seed(7))
    model.eval()
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        result: Tensor = model(batch.to(device.DEVICE, dtype)).float()
    return result


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs of equal weights are equal.

    To the bit on a CPU. A GPU's libraries choose kernels by where weights lie in memory too.
    """
    if device.DEVICE == "cpu":
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0.02, atol=0.02)


def whole(tensor: Any) -> Tensor:
    """All elements, in every process."""
    result: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor.clone()
    return result


def whole_weights(averaged: AveragedWeights) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in averaged.weights.items()}


def bits_of(engine: Any) -> dict[str, Tensor]:
    """What the engine keeps of the model in this process, padding too: pieces and masters."""
    held = {}
    for name, parameter in engine.module.named_parameters():
        held[f"{name} piece"] = bits(parameter.ds_tensor)
        master = deepspeed().utils.safe_get_local_fp32_param(parameter)
        if master is not None:
            held[f"{name} master"] = bits(master)
    held |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    return held


def masters(engine: Any) -> dict[str, Tensor]:
    """Copies of what an average is made of: float32 pieces without padding, by name."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        piece = deepspeed().utils.safe_get_local_fp32_param(parameter)
        piece = parameter.ds_tensor if piece is None else piece
        start = dist.get_rank() * piece.numel()
        numel = max(0, min(piece.numel(), parameter.ds_numel - start))
        found[name] = piece[:numel].detach().clone()
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose values aren't the same to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


class Training:
    """An engine and its average, which are saved and resumed together."""

    def __init__(self, folder: Path, seed: int = 0, **options: Any) -> None:
        self.engine = partitioned(network(seed), **options)
        self.averaged = AveragedWeights(self.engine.module, 0.25, averaged_dtype=torch.float64)
        self.folder = folder

    def step(self, number: int, *, dies: bool = False) -> None:
        train(self.engine, number)
        if dies:
            die()
        self.averaged.update_parameters(self.engine.module)

    def state(self) -> dict[str, Any]:
        return averaged_state_dict(self.averaged, self.engine.module)

    def save(self) -> None:
        self.engine.save_checkpoint(str(self.folder / "engine"), tag=str(int(self.averaged.steps)))
        checkpoints.save(self.state(), self.folder / "averaged")

    def resume(self) -> None:
        self.load_average()
        self.engine.load_checkpoint(str(self.folder / "engine"), tag=str(int(self.averaged.steps)))

    def load_average(self) -> None:
        state = self.state()
        checkpoints.load(state, self.folder / "averaged")
        load_averaged_state_dict(self.averaged, self.engine.module, state)
