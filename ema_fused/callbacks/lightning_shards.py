"""Averages of models that a strategy of Lightning shards: each process averages what it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.torch_functions import weight_and_arithmetic
from ema_fused.engine.dtensors import local
from ema_fused.modules.sharding import Device, is_flattened

__all__ = ["ShardAverage", "average_of_shards"]


class ShardAverage(AveragedWeights):
    """Stands where the callbacks have an ``AveragedModel`` under other strategies."""

    @property
    def n_averaged(self) -> Tensor:
        steps = self.steps
        assert isinstance(steps, Tensor)
        return steps


class _ByFunction(ShardAverage):
    """Calls a user's function for each shard.

    Args:
        function: as torch's ``avg_fn``: takes two tensors and their number, returns the average.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(model, **options)
        self._function = function

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged, source = local(averaged_param), local(source_param)
        if averaged.numel():  # a process may hold no row of a tensor
            averaged.copy_(self._function(averaged, source, steps.to(averaged.device)))


def average_of_shards(
    model: nn.Module,
    *,
    device: Device,
    use_buffers: bool,
    avg_fn: Callable[..., Any] | None = None,
    multi_avg_fn: Callable[..., Any] | None = None,
) -> ShardAverage:
    """The average of a model that was sharded before. Its processes don't communicate.

    The average of 16-bit weights is kept in float32, except FSDP1's, which can't be saved so.

    Args:
        model: as the strategy has wrapped it.
        device: of the average; None: the model's.
        use_buffers: average floating-point buffers too.
        avg_fn: as in torch's ``AveragedModel``. A function of one's own is called with shards.
        multi_avg_fn: likewise, with lists of one shard each.

    Raises:
        ValueError: a function of one's own isn't elementwise, so that it can't be given shards.
    """
    function = multi_avg_fn if avg_fn is None else avg_fn
    weight_at, arithmetic = weight_and_arithmetic(function)
    options: dict[str, Any] = {
        "device": device,
        "update_buffers": use_buffers,
        "averaged_dtype": _dtype_of_averages(model),
    }
    if weight_at is not None:
        return ShardAverage(model, weight_at, arithmetic=arithmetic, **options)
    assert function is not None
    name = "avg_fn" if multi_avg_fn is None else "multi_avg_fn"
    by_tensor = function if multi_avg_fn is None else _one_by_one(function)
    _refuse_unless_elementwise(name, by_tensor)
    return _ByFunction(model, by_tensor, **options)


def _one_by_one(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """``multi_avg_fn`` as ``avg_fn``."""

    def average(averaged: Tensor, source: Tensor, n_averaged: Tensor) -> Tensor:
        function([averaged], [source], n_averaged)
        return averaged

    return average


def _refuse_unless_elementwise(name: str, function: Callable[..., Any]) -> None:
    """Raises ValueError if ``function`` makes another average of parts than of the whole."""
    averaged, source = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    count = torch.ones((), dtype=torch.long)
    whole = function(averaged.clone(), source.clone(), count).clone()
    parts = [
        function(averaged[part].clone(), source[part].clone(), count).clone()
        for part in (slice(0, 5), slice(5, 12))
    ]
    if not torch.allclose(whole, torch.cat(parts), rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"{name} averages a part of a tensor otherwise than the whole one, and under this "
            f"strategy a process has a part of each tensor only; an elementwise function is "
            f"expected, as decay * averaged + (1 - decay) * current is"
        )


def _dtype_of_averages(model: nn.Module) -> torch.dtype | None:
    if is_flattened(model):
        return None
    held = (*model.parameters(), *model.buffers())
    dtypes = {tensor.dtype for tensor in held if tensor.is_floating_point()}
    has_short = bool(dtypes & {torch.bfloat16, torch.float16})
    return torch.float32 if has_short and torch.float64 not in dtypes else None
