"""What trainings of sharded models are expected to have left, computed in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from tests.frameworks.callbacks import lightning_sharded_run as run
from tests.networks import differences

State = dict[str, Tensor]
RESUMED = 2 * run.BATCHES  # the step of the checkpoint that is resumed


def found(folder: Path, rank: int = 0) -> dict[str, Any]:
    seen: dict[str, Any] = torch.load(folder / f"found-{rank}.pt", weights_only=False)
    return seen


def averages(own: dict[int, State], *, function: Any = None, buffers: bool = True) -> State:
    """The average of recorded weights, by torch's formula, in one process."""
    function = get_ema_avg_fn(0.75) if function is None else function
    first, *others = sorted(own)
    average = {name: tensor.clone() for name, tensor in own[first].items()}
    for count, step in enumerate(others, 1):
        for name, tensor in own[step].items():
            is_averaged = tensor.is_floating_point() and (buffers or name != "level")
            number = torch.tensor(count)
            average[name] = function(average[name], tensor, number) if is_averaged else tensor
    return average


def loss_of(state: State) -> float:
    network = run.Perceptron()
    network.load_state_dict(state)
    random = torch.Generator().manual_seed(1000)
    images, targets = torch.randn(6, 7, generator=random), torch.randn(6, 3, generator=random)
    with torch.no_grad():
        return float((network(images) - targets).square().mean())


def until(own: dict[int, State], step: int) -> dict[int, State]:
    return {number: state for number, state in own.items() if number <= step}


def assert_begins_with(resumed: dict[str, Any], own: dict[int, State], step: int = RESUMED) -> None:
    """That a training went on with the weights and averages after a step of another."""
    assert resumed["at_start"]["n_averaged"] == step
    assert differences(resumed["at_start"]["own"], own[step]) == []
    assert differences(resumed["at_start"]["averages"], averages(until(own, step))) == []


def mean(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
    return averaged + (current - averaged) / (count + 1)
