"""Averages that others make of sharded models by gathering them at each update, beside ours.

Restated: the ``ExponentialMovingAverage`` of NVIDIA's Model-Optimizer (``modelopt.torch.fastgen``)
for FSDP2, in its default mode, and Self-Forcing's ``EMA_FSDP`` for FSDP1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused import AveragedWeights
from ema_fused.engine.dtensors import is_sharded, local
from tests.modules.sharded_beside import state_of
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread, train, trainer

STEPS, DECAY = 4, 0.75
PARAMETERS = sum(one.numel() for one in perceptron().parameters())


class WholeAverage:
    """A whole average on every process, in host memory."""

    def __init__(self, model: nn.Module) -> None:
        self.averages: dict[str, Tensor] = {}
        self.update(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if isinstance(model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                self._average(model)
        else:
            self._average(model)

    def _average(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            value = parameter.full_tensor() if is_sharded(parameter) else parameter
            now = value.detach().float().cpu()
            plain = name.replace("_fsdp_wrapped_module.", "")
            if plain in self.averages:
                self.averages[plain].mul_(DECAY).add_(now, alpha=1 - DECAY)
            else:
                self.averages[plain] = now.clone()


class Facts(NamedTuple):
    apart: float  # of the two averages, the most
    sent: tuple[int, int]  # collectives in updates: theirs, ours
    kept: tuple[int, int]  # elements of the averages in this process: theirs, ours


def beside(way: str) -> Facts:
    model = spread(perceptron(), way)
    optimizer = trainer(model)
    theirs, ours = WholeAverage(model), AveragedWeights(model, 1 - DECAY)
    ours.update_parameters(model)
    updates: list[Callable[[nn.Module], None]] = [theirs.update, ours.update_parameters]
    sent = [0, 0]
    for number in range(STEPS):
        train(model, optimizer, number, way)
        for which, update in enumerate(updates):
            with CommDebugMode() as seen:
                update(model)
            sent[which] += seen.get_total_counts()
    whole = state_of(ours, model)
    apart = max(
        float((whole[f"module.{name}"] - one).abs().max()) for name, one in theirs.averages.items()
    )
    kept = sum(local(one).numel() for one in ours.module.parameters())
    return Facts(
        apart, (sent[0], sent[1]), (sum(map(Tensor.numel, theirs.averages.values())), kept)
    )


@pytest.mark.parametrize(
    ("way", "gathers"),
    [
        ("fsdp2", len(list(perceptron().parameters()))),  # one for each parameter
        ("fsdp1", 3),  # and one for each unit: two layers, and what is left
    ],
)
def test_the_averages_are_the_same_and_only_theirs_gather(
    two_ranks: Ranks, way: str, gathers: int
) -> None:
    every: list[Facts] = two_ranks.run(beside, way)
    for facts in every:
        assert facts.apart < 1e-6
        assert facts.sent == (STEPS * gathers, 0)
        assert facts.kept[0] == PARAMETERS
    assert sum(facts.kept[1] for facts in every) == PARAMETERS
