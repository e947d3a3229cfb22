"""``skip_nonfinite``: a step that leaves infinite or NaN weights isn't averaged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights, attach
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    CosineEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.modules.finite import nonfinite_flag
from tests.networks import CPU_BACKENDS, Weight, conv_net, differences, generator, snapshot, train
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread

BAD = (math.nan, math.inf, -math.inf)


class OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ema": (ExponentialMovingAverage, {"momentum": 0.3}),
    "weights": (AveragedWeights, {"momentum": 0.3}),
    "schedule": (MomentumAnnealingEMA, {"gamma": 3}),
    "mean": (StochasticWeightAverage, {}),
    "cosine": (CosineEMA, {"momentum": 0.3, "max_iters": 9}),
    "one by one": (OneByOne, {}),
    "interval": (ExponentialMovingAverage, {"momentum": 0.3, "interval": 2}),
    "every": (ExponentialMovingAverage, {"momentum": 0.3, "every": 2}),
    "begin_step": (ExponentialMovingAverage, {"momentum": 0.3, "begin_step": 4}),
    "buffers": (ExponentialMovingAverage, {"momentum": 0.3, "update_buffers": "running"}),
    "double": (ExponentialMovingAverage, {"momentum": 0.3, "averaged_dtype": torch.float64}),
    "stochastic": (
        ExponentialMovingAverage,
        {"momentum": 0.3, "averaged_dtype": torch.bfloat16, "rounding": "stochastic"},
    ),
    "offload": (ExponentialMovingAverage, {"momentum": 0.3, "offload": "cpu"}),
    "distance": (ExponentialMovingAverage, {"momentum": 0.3, "distance_every": 1}),
    "capturable": (ExponentialMovingAverage, {"momentum": 0.3, "capturable": True}),
    "capturable interval": (
        ExponentialMovingAverage,
        {"momentum": 0.3, "capturable": True, "interval": 2},
    ),
}


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
@pytest.mark.parametrize("bad_calls", [{0}, {1, 2}, {3}, {0, 1, 2, 5, 6}], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_the_average_is_that_of_the_finite_steps_alone(name: str, bad_calls: set[int]) -> None:
    kind, options = KINDS[name]
    model = conv_net()
    averaged = kind(model, **options, skip_nonfinite=True)
    expected = kind(model, **options)
    random = generator()
    for call in range(9):
        train(model, random)
        if call not in bad_calls:
            averaged.update_parameters(model)
            expected.update_parameters(model)
        else:
            before = snapshot(averaged)
            kept = model.hidden.weight[3, 2].item()
            with torch.no_grad():
                model.hidden.weight[3, 2] = BAD[call % 3]
                averaged.update_parameters(model)
                model.hidden.weight[3, 2] = kept
            assert differences(snapshot(averaged), before) == []
        assert averaged.steps == expected.steps
        assert differences(snapshot(averaged), snapshot(expected)) == []
    assert all(bool(tensor.isfinite().all()) for tensor in averaged.state_dict().values())


def test_it_is_off_by_default() -> None:
    averaged, model = ExponentialMovingAverage(Weight(), 0.5), Weight()
    averaged.update_parameters(model)
    averaged.update_parameters(model.set_to(math.nan))
    assert averaged.module.weight.isnan() and averaged.steps == 2


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_scaler_neither_overflows_nor_nan_count(fused: bool) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    averaged = ExponentialMovingAverage(model, 0.5, skip_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with attach(optimizer, model, averaged):
        for call in range(7):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 1, 8, 8)).square().mean()).backward()
            assert model.head.weight.grad is not None
            if call == 2:
                model.head.weight.grad.fill_(math.inf)
            good = model.head.bias.detach().clone()
            if call == 4:  # the optimizer steps, and the weights are NaN
                with torch.no_grad():
                    model.head.bias.fill_(math.nan)
            scaler.step(optimizer)
            scaler.update()
            if call == 4:
                with torch.no_grad():
                    model.head.bias.copy_(good)
    assert averaged.steps == 5
    assert all(bool(tensor.isfinite().all()) for tensor in averaged.module.parameters())


def test_a_flag_that_is_given_counts_too() -> None:
    averaged, model = ExponentialMovingAverage(Weight(), 0.5, skip_nonfinite=True), Weight()
    averaged.update_parameters(model)
    for flag, counted in (
        (torch.tensor([1.0]), 1),
        (torch.tensor(True), 1),
        (torch.tensor(0), 2),
        (torch.zeros(1, 1), 3),
    ):
        averaged.update_parameters(model, found_inf=flag)
        assert averaged.steps == counted
    with pytest.raises(TypeError, match="a tensor of one number is expected"):
        averaged.update_parameters(model, found_inf=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_buffers_and_shared_parameters_are_not_looked_at(backend: str | None) -> None:
    model = conv_net()
    model.register_buffer("mask", torch.full((2, 2), -math.inf))
    model.hidden.weight.requires_grad_(False).fill_(math.inf)
    averaged = ExponentialMovingAverage(
        model, 0.5, skip_nonfinite=True, share_frozen=True, backend=backend
    )
    for _ in range(2):
        averaged.update_parameters(model)
    assert averaged.steps == 2
    frozen_too = ExponentialMovingAverage(model, 0.5, skip_nonfinite=True, backend=backend)
    frozen_too.update_parameters(model)
    assert frozen_too.steps == 0


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 33, 1000])
def test_the_flag_of_every_place_and_dtype(dtype: torch.dtype, size: int) -> None:
    tensors = [torch.randn(5), torch.randn(size, dtype=dtype), torch.zeros(0), torch.arange(3)]
    assert nonfinite_flag(tensors) == 0
    for place in {0, size // 2, size - 1}:
        for bad in BAD:
            held = tensors[1][place].clone()
            tensors[1][place] = bad
            assert nonfinite_flag(tensors) == 1
            tensors[1][place] = held
    assert nonfinite_flag(tensors) == 0


def test_the_largest_finite_numbers_are_finite() -> None:
    for dtype in DTYPES[:-1]:
        largest = torch.finfo(dtype).max
        assert nonfinite_flag([torch.tensor([largest, -largest] * 9, dtype=dtype)]) == 0
    eight = torch.tensor([448.0, -448.0]).to(torch.float8_e4m3fn)
    assert nonfinite_flag([eight]) == 0
    assert nonfinite_flag([torch.tensor([math.nan]).to(torch.float8_e4m3fn)]) == 1


def test_without_parameters_the_given_flag_decides() -> None:
    assert nonfinite_flag([]) == 0
    assert nonfinite_flag([torch.arange(3)], torch.tensor([1.0])) == 1
    assert nonfinite_flag([nn.Parameter(torch.ones(2))]).requires_grad is False


def steps_of_shards(way: str) -> tuple[list[int], bool]:
    """Of an average whose model has one NaN, in one process, at the second of three steps."""
    import torch.distributed as dist

    model = spread(perceptron(), way)
    averaged = AveragedWeights(model, 0.5, skip_nonfinite=True)
    steps = []
    for call in range(3):
        largest = max(model.parameters(), key=lambda parameter: parameter.numel())
        mine = getattr(largest, "_local_tensor", largest)
        with torch.no_grad():
            if call == 1 and dist.get_rank() == 1:
                kept = mine.detach().clone()
                mine.fill_(math.nan)
        averaged.update_parameters(model)
        with torch.no_grad():
            if call == 1 and dist.get_rank() == 1:
                mine.copy_(kept)
        steps.append(int(averaged.steps))
    shards = [getattr(tensor, "_local_tensor", tensor) for tensor in averaged.weights.values()]
    return steps, all(bool(shard.isfinite().all()) for shard in shards)


@pytest.mark.parametrize("way", ["fsdp2", "tensor_parallel"])
def test_processes_of_a_mesh_decide_together(two_ranks: Ranks, way: str) -> None:
    for steps, is_finite in two_ranks.run(steps_of_shards, way):
        assert steps == [1, 1, 2]
        assert is_finite


def refusal_of_flattened() -> str:
    model = spread(perceptron(), "fsdp1")
    with pytest.raises(ValueError) as raised:
        AveragedWeights(model, skip_nonfinite=True)
    return str(raised.value)


def test_pieces_of_flattened_parameters_are_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(refusal_of_flattened):
        assert message.startswith("skip_nonfinite=True with FSDP1")
