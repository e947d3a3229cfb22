"""TRL's reference models under DeepSpeed's ZeRO-3, by deepspeed itself in two processes."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_fused.callbacks.trl import SyncRefModelCallback
from tests.ranks import Ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)


def partitioned(seed: int) -> nn.Module:
    deepspeed: Any = importlib.import_module("deepspeed")

    torch.manual_seed(seed)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32):
        return nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 3))


def whole(model: nn.Module) -> list[Tensor]:
    deepspeed: Any = importlib.import_module("deepspeed")

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return [parameter.detach().clone() for parameter in model.parameters()]


def synchronised() -> list[bool]:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    deepspeed: Any = importlib.import_module("deepspeed")

    operators: dict[str, bool] = deepspeed.ops.__compatible_ops__
    operators.update(dict.fromkeys(operators, False))  # it would compile them, for seconds
    deepspeed.init_distributed("gloo", dist_init_required=False)
    model, reference = partitioned(0), partitioned(1)
    assert not any(parameter.numel() for parameter in reference.parameters())
    source, expected = whole(model), whole(reference)
    SyncRefModelCallback.sync_target_model(model, reference, 0.3)
    for average, new in zip(expected, source, strict=True):
        average.mul_(1 - 0.3).add_(new, alpha=0.3)
    found: list[Any] = [*whole(reference), *whole(model)]
    return [torch.equal(*pair) for pair in zip(found, [*expected, *source], strict=True)]


def test_what_zero3_has_partitioned_is_gathered_and_averaged(two_ranks: Ranks) -> None:
    assert two_ranks.run(synchronised) == [[True] * 8] * 2
