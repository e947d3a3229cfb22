"""LatestWeightAverage of models that are sharded between processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ema_fused import LatestWeightAverage
from ema_fused.saving import averaged_state_dict, checkpoints, load_averaged_state_dict
from tests.averages.latest_means import Tensors, mean, parameters
from tests.networks import differences, generator
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread, whole


def of_shards(folder: str) -> tuple[Tensors, Tensors, Tensors]:
    model = spread(perceptron(), "fsdp2")
    average = LatestWeightAverage(model, 2)
    plain = perceptron()
    steps = generator(3)
    recorded: list[Tensors] = []

    def step(averages: list[LatestWeightAverage]) -> None:
        with torch.no_grad():
            for sharded, one in zip(model.parameters(), plain.parameters(), strict=True):
                change = torch.randn(one.shape, generator=steps)
                one.add_(change)
                placed: Any = torch.distributed.tensor.distribute_tensor(
                    change,
                    sharded.device_mesh,  # type: ignore[attr-defined]
                    sharded.placements,  # type: ignore[attr-defined]
                )
                sharded.add_(placed)
        recorded.append(parameters(plain))
        for each in averages:
            each.update_parameters(model)

    for _ in range(3):
        step([average])
    resumed, from_files = LatestWeightAverage(model, 2), LatestWeightAverage(model, 2)
    saved = averaged_state_dict(average, model, full_state_dict=True)
    load_averaged_state_dict(resumed, model, saved)
    checkpoints.save({"averaged": averaged_state_dict(average, model)}, folder)
    state = averaged_state_dict(from_files, model)
    checkpoints.load({"averaged": state}, folder)
    load_averaged_state_dict(from_files, model, state)
    step([resumed, from_files])
    expected = mean(recorded[-2:])
    found = [
        {name: whole(each.weights[name]) for name in expected} for each in (resumed, from_files)
    ]
    return found[0], found[1], expected


def test_shards_are_averaged_and_resumed_to_the_bit(two_ranks: Ranks, tmp_path: Path) -> None:
    for resumed, from_files, expected in two_ranks.run(of_shards, str(tmp_path / "saved")):
        assert differences(resumed, expected) == []
        assert differences(from_files, expected) == []


def refusal_of_flattened() -> str:
    with pytest.raises(ValueError) as raised:
        LatestWeightAverage(spread(perceptron(), "fsdp1"), 2)
    return str(raised.value)


def test_flattened_parameters_are_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(refusal_of_flattened):
        assert message.startswith("LatestWeightAverage of a model sharded by FSDP1")
