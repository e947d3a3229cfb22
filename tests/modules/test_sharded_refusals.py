"""What averages of spread models can't be is refused, with what to do."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.saving.checkpoints import averaged_state_dict
from tests.modules.sharded_beside import differing
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread


def refusals() -> list[str]:
    def said(action: Any) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    found = []
    sharded = spread(perceptron(), "fsdp2")
    found.append(said(lambda: ExponentialMovingAverage(sharded)))
    early = AveragedWeights(perceptron())
    before = {name: tensor.clone() for name, tensor in early.weights.items()}
    found.append(said(lambda: early.update_parameters(sharded)))
    assert not differing(before, early.weights)
    mesh = init_device_mesh("cpu", (2,))
    otherwise = perceptron()
    otherwise.first.weight = nn.Parameter(
        distribute_tensor(otherwise.first.weight.detach(), mesh, [Replicate()])
    )
    average = AveragedWeights(otherwise)
    otherwise.first.weight = nn.Parameter(
        otherwise.first.weight.detach().redistribute(placements=[Shard(0)])
    )
    found.append(said(lambda: average.update_parameters(otherwise)))
    sums = perceptron()
    sums.scale = nn.Parameter(DTensor.from_local(torch.ones(1), mesh, [Partial()]))
    found.append(said(lambda: AveragedWeights(sums).update_parameters(sums)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flattened = spread(perceptron(), "fsdp1")
    found.append(said(lambda: ExponentialMovingAverage(flattened)))
    found.append(said(lambda: AveragedWeights(flattened).state_dict()))
    rounded = AveragedWeights(flattened, averaged_dtype=torch.float64)
    found.append(said(lambda: averaged_state_dict(rounded, flattened)))
    return found


def test_what_cannot_be_is_refused_with_what_to_do(two_ranks: Ranks) -> None:
    expected = [
        "TypeError: FSDPPerceptron is sharded by FSDP, .*AveragedWeights",
        "TypeError: 'scale' is a DTensor in the model and a plain tensor in the average.*"
        "Shard the model first",
        r"ValueError: 'first.weight' is placed as \(Replicate\(\),\).* in the average and as "
        r"\(Shard\(dim=0\),\)",
        "TypeError: 'scale' is placed as .*sums over processes.*redistribute",
        "TypeError: FullyShardedDataParallel is sharded by FSDP, .*AveragedWeights",
        r"RuntimeError: FSDP1 flattens.*averaged_state_dict\(averaged, model\)",
        "ValueError: '.*' has another dtype in the average.*FSDP1 would round",
    ]
    for found in two_ranks.run(refusals):
        for message, pattern in zip(found, expected, strict=True):
            assert re.match(pattern, message, re.DOTALL), message
