"""ZeRO-3 trainings resumed on other numbers of processes by DeepSpeed's universal checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.frameworks.zero3_models import (
    Training,
    deepspeed,
    differing,
    masters,
    network,
    outputs,
    whole,
    whole_weights,
)
from tests.ranks import Ranks, started

pytest.importorskip("deepspeed", reason="DeepSpeed isn't installed")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STEPS, MORE, MOMENTUM = 3, 2, 0.25
NOT_IN_UNIVERSAL = ["frozen.weight", "frozen.bias", "batches"]


class Trained(NamedTuple):
    """Whole tensors after ``STEPS`` steps (or loaded), and after ``MORE`` further ones."""

    averages: dict[str, Tensor]
    model: dict[str, Tensor]
    after_more: dict[str, Tensor]


def trained(folder: Path) -> Trained:
    """Saves after ``STEPS`` steps, makes a universal checkpoint of it, and trains on."""
    training = Training(folder)
    for number in range(STEPS):
        training.step(number)
    training.save()
    dist.barrier()
    if dist.get_rank() == 0:
        make_universal(folder / "engine")
    averages, model = whole_weights(training.averaged), whole_model(training)
    train_on(training)
    return Trained(averages, model, whole_weights(training.averaged))


def make_universal(folder: Path) -> None:
    """What its users call by ``python -m deepspeed.checkpoint.ds_to_universal``."""
    deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    folders = ["--input_folder", str(folder / str(STEPS)), "--output_folder", str(folder / "other")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]  # in this process
    with mock.patch.object(sys, "argv", ["ds_to_universal", *folders, *workers]):
        ds_to_universal.main(ds_to_universal.parse_arguments())


def whole_model(training: Training) -> dict[str, Tensor]:
    """The float32 weights and the buffers, whole."""
    pieces = masters(training.engine)
    average = training.averaged.module
    found = {}
    for name, parameter in average.named_parameters():
        other = parameter.detach().clone()
        other.to_local().copy_(pieces[name])  # type: ignore[attr-defined]
        found[name] = whole(other)
    return found | {n: b.clone() for n, b in training.engine.module.named_buffers()}


def train_on(training: Training) -> None:
    """Further steps, whose averages are those of the recorded pieces, to the bit."""
    averages = dict(training.averaged.module.named_parameters())
    expected = {name: average.to_local().clone() for name, average in averages.items()}
    for number in range(STEPS, STEPS + MORE):
        training.step(number)
        for name, piece in masters(training.engine).items():
            expected[name].lerp_(piece.double(), MOMENTUM)
    assert not differing({name: one.to_local() for name, one in averages.items()}, expected)
    assert int(training.averaged.steps) == STEPS + MORE


def resumed(folder: Path) -> Trained:
    training = Training(folder, seed=3, universal=True)
    fresh = whole_model(training)
    training.load_average()
    training.engine.load_checkpoint(str(folder / "engine"), tag="other")
    assert not set(differing(fresh, whole_model(training))) & set(NOT_IN_UNIVERSAL)
    assert training.engine.global_steps == int(training.averaged.steps) == STEPS
    averages, model = whole_weights(training.averaged), whole_model(training)
    with training.averaged.swapped(training.engine.module):
        said = outputs(training.engine)
    plain = network()
    plain.load_state_dict(averages)
    assert torch.equal(said, outputs(plain.bfloat16()))
    restore_frozen(training)
    train_on(training)
    return Trained(averages, model, whole_weights(training.averaged))


def restore_frozen(training: Training) -> None:
    """Which universal checkpoints don't have, and users load from where they have them."""
    frozen = list(training.engine.module.frozen.parameters())
    with deepspeed().zero.GatheredParameters(frozen, modifier_rank=0):
        training.engine.module.frozen.load_state_dict(network(0).frozen.state_dict())
    training.engine.module.batches.fill_(STEPS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def expected(deepspeed_ranks: Ranks, checkpoint: Path) -> Trained:
    first, second = deepspeed_ranks.run(trained, checkpoint)
    assert not differing(first.after_more, second.after_more)
    return first


def check(found: Trained, expected: Trained) -> None:
    assert not differing(found.averages, expected.averages)
    assert differing(found.model, expected.model) == NOT_IN_UNIVERSAL


@pytest.mark.parametrize("count", [1, 4])
def test_averages_go_on_where_the_training_does_on_other_numbers_of_processes(
    expected: Trained, checkpoint: Path, count: int
) -> None:
    with started(count) as ranks:
        every = ranks.run(resumed, checkpoint)
    for found in every:
        check(found, expected)
        # Each process has samples of its own, so another number of them trains otherwise.
        assert "first.weight" in differing(found.after_more, expected.after_more)


def test_on_as_many_processes_it_is_as_if_nothing_had_happened(
    deepspeed_ranks: Ranks, expected: Trained, checkpoint: Path
) -> None:
    for found in deepspeed_ranks.run(resumed, checkpoint):
        check(found, expected)
        assert not differing(found.after_more, expected.after_more)
