"""States of averages of ZeRO-3 models: saved by some processes, loaded by others, exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import fully_shard

from ema_fused import AveragedWeights
from ema_fused.saving import checkpoints
from ema_fused.saving.checkpoints import averaged_state_dict, load_averaged_state_dict
from ema_fused.saving.export import export_safetensors, model_state_dict
from tests.frameworks.zero3_models import (
    Training,
    differing,
    masters,
    network,
    whole,
    whole_weights,
)
from tests.ranks import Ranks, started
from tests.saving.killed_saves_run import Death, die_at

pytest.importorskip("deepspeed", reason="DeepSpeed isn't installed")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STEPS = 3


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    with started(4) as ranks:
        yield ranks


def saved(folder: Path) -> dict[str, Tensor]:
    training = Training(folder)
    for number in range(STEPS):
        training.step(number)
    training.save()
    return whole_weights(training.averaged)


def loaded(folder: Path, steps: int) -> dict[str, Tensor]:
    training = Training(folder, seed=1)
    training.load_average()
    assert int(training.averaged.steps) == steps
    with_training = whole_weights(training.averaged)
    # It goes on from there, in pieces of other sizes.
    before = {name: whole(tensor) for name, tensor in training.averaged.weights.items()}
    training.step(steps)
    recorded = masters(training.engine)
    for name, parameter in training.averaged.module.named_parameters():
        cut = parameter.cut  # type: ignore[attr-defined]
        start, stop = cut.bounds(parameter.numel())
        expected = before[name].flatten()[start:stop].lerp(recorded[name].double(), 0.25)
        assert torch.equal(parameter.to_local(), expected)  # type: ignore[attr-defined]
    return with_training


def average_of(seed: int, **options: Any) -> AveragedWeights:
    """Of a plain model, as it is without DeepSpeed."""
    return AveragedWeights(network(seed), 0.25, averaged_dtype=torch.float64, **options)


def loaded_here(folder: Path) -> dict[str, Tensor]:
    averaged = average_of(3)
    state = averaged.state_dict()
    checkpoints.load(state, folder / "averaged")
    averaged.load_state_dict(state)
    assert int(averaged.steps) == STEPS
    return averaged.weights


@pytest.fixture(scope="module")
def checkpoint(deepspeed_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def expected(deepspeed_ranks: Ranks, checkpoint: Path) -> dict[str, Tensor]:
    first, second = deepspeed_ranks.run(saved, checkpoint)
    assert not differing(first, second)
    return first


def test_a_checkpoint_has_the_names_and_shapes_of_the_plain_model(
    expected: dict[str, Tensor], checkpoint: Path
) -> None:
    found = FileSystemReader(checkpoint / "averaged").read_metadata().state_dict_metadata
    shapes = {name: tuple(tensor.size) for name, tensor in found.items()}
    plain = {f"module.{name}": tuple(t.shape) for name, t in network().state_dict().items()}
    assert shapes == {"steps": (), **plain}


def test_it_is_loaded_by_two_by_four_and_by_a_plain_model_in_one(
    deepspeed_ranks: Ranks,
    four_ranks: Ranks,
    expected: dict[str, Tensor],
    checkpoint: Path,
) -> None:
    for ranks in (deepspeed_ranks, four_ranks):
        for found in ranks.run(loaded, checkpoint, STEPS):
            assert not differing(found, expected)
    assert not differing(loaded_here(checkpoint), expected)


def loaded_by_rows(folder: Path) -> dict[str, Tensor]:
    model = network(4)
    fully_shard(model.last)
    fully_shard(model)
    averaged = AveragedWeights(model, 0.25, averaged_dtype=torch.float64)
    state = averaged_state_dict(averaged, model)
    checkpoints.load(state, folder / "averaged")
    load_averaged_state_dict(averaged, model, state)
    by_rows = whole_weights(averaged)
    checkpoints.save(averaged_state_dict(averaged, model), folder / "by-rows" / "averaged")
    training = Training(folder / "by-rows", seed=5)
    training.load_average()
    assert not differing(whole_weights(training.averaged), by_rows)
    return by_rows


def test_checkpoints_of_fsdp2_and_of_zero_3_are_each_others(
    deepspeed_ranks: Ranks, expected: dict[str, Tensor], checkpoint: Path
) -> None:
    for found in deepspeed_ranks.run(loaded_by_rows, checkpoint):
        assert not differing(found, expected)


def whole_states(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    training = Training(folder)
    training.load_average()
    averaged, model = training.averaged, training.engine.module
    found = averaged_state_dict(averaged, model, full_state_dict=True)
    on_host = averaged_state_dict(averaged, model, full_state_dict=True, cpu_offload=True)
    other = AveragedWeights(model, 0.25, averaged_dtype=torch.float64)
    load_averaged_state_dict(other, model, found)
    assert not differing(whole_weights(other), whole_weights(averaged))
    # A file of each rank's own.
    path = folder / f"rank-{dist.get_rank()}.pt"
    torch.save(averaged.state_dict(), path)
    another = AveragedWeights(model, 0.25, averaged_dtype=torch.float64)
    another.load_state_dict(torch.load(path))
    assert not differing(whole_weights(another), whole_weights(averaged))
    return found, on_host


def test_whole_states_fit_a_plain_average(
    deepspeed_ranks: Ranks, expected: dict[str, Tensor], checkpoint: Path
) -> None:
    (found, on_host), (second, rest) = deepspeed_ranks.run(whole_states, checkpoint)
    assert not differing(found, second) and not differing(found, on_host) and rest == {}
    averaged = average_of(6)
    averaged.load_state_dict(found)
    assert not differing(averaged.weights, expected)
    assert int(averaged.steps) == STEPS


def exported(folder: Path) -> None:
    training = Training(folder)
    training.load_average()
    export_safetensors(training.averaged.weights, folder / "weights")
    export_safetensors(training.state(), folder / "state", max_shard_bytes=1000)
    state = model_state_dict(training.engine.module, training.averaged.weights)
    export_safetensors(state, folder / "model", dtype=torch.float32)


def test_an_export_is_whole_and_loads_strictly_into_the_plain_model(
    deepspeed_ranks: Ranks, expected: dict[str, Tensor], checkpoint: Path
) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    deepspeed_ranks.run(exported, checkpoint)
    for name, dtype in (("weights", torch.float64), ("state", torch.float64), ("model", None)):
        found: dict[str, Tensor] = {}
        files = sorted((checkpoint / name).glob("*.safetensors"))
        assert len(files) > 1 if name == "state" else len(files) == 1
        for file in files:
            found |= load_file(file)
        plain = network(7).to(dtype or torch.float32)
        plain.load_state_dict(found)
        rounded = {key: one.to(plain.state_dict()[key].dtype) for key, one in expected.items()}
        assert not differing(dict(plain.state_dict()), rounded)


def trained(folder: Path, dies: str = "", resumes: bool = False) -> list[dict[str, Tensor]]:
    """The averages and the pieces of this rank after each step made here."""
    training = Training(folder, seed=8 if resumes else 0)
    if resumes:
        training.resume()
    found = []
    for number in range(int(training.averaged.steps), 4):
        is_last = dist.get_rank() == 1 and number == 2
        training.step(number, dies=is_last and dies == "step")
        if is_last and dies == "save":
            die_at(Death(1, number, "open", 1), folder / "averaged")
        training.save()
        own = {f"{name} master": piece for name, piece in masters(training.engine).items()}
        found.append(whole_weights(training.averaged) | own)
    return found


@pytest.fixture(scope="module")
def uninterrupted(
    deepspeed_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, Tensor]]]:
    return deepspeed_ranks.run(trained, tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("dies", ["step", "save"])
def test_killed_it_resumes_to_the_bit(
    dies: str,
    deepspeed_ranks: Ranks,
    four_ranks: Ranks,
    uninterrupted: list[list[dict[str, Tensor]]],
    tmp_path: Path,
) -> None:
    with started(2) as killed, pytest.raises(AssertionError, match="a process ended"):
        killed.run(trained, tmp_path, dies)
    before = uninterrupted[0][1]
    for found in four_ranks.run(loaded, tmp_path, 2):
        assert not differing(found, {name: before[name] for name in found})
    resumed = deepspeed_ranks.run(trained, tmp_path, "", True)
    for states, wanted in zip(resumed, uninterrupted, strict=True):
        assert len(states) == 2
        for state, expected in zip(states, wanted[2:], strict=True):
            assert not differing(state, expected)
