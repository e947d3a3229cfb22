"""BEMA of models that DeepSpeed's ZeRO-3 partitions, beside its formula over recorded pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused import BiasCorrectedEMA
from ema_fused.engine.dtensors import local
from ema_fused.saving import checkpoints
from ema_fused.saving.checkpoints import averaged_state_dict, load_averaged_state_dict
from tests.frameworks.zero3_models import (
    alike,
    bits_of,
    differing,
    masters,
    network,
    outputs,
    partitioned,
    train,
    whole,
)
from tests.ranks import Ranks, started

pytest.importorskip("deepspeed", reason="DeepSpeed isn't installed")

POWERS = {"ema_power": 0.3, "bias_power": 0.7, "lag": 3}
STEPS = 3
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    with started(4) as ranks:
        yield ranks


class Training:
    """An engine, its average, and the formula over the float32 pieces of this process."""

    def __init__(self, bf16: bool = True, seed: int = 0) -> None:
        self.engine = partitioned(network(seed), bf16=bf16)
        self.averaged = BiasCorrectedEMA(self.engine.module, **POWERS)
        self.averaged.update_parameters(self.engine.module)
        self.initial, self.average = masters(self.engine), masters(self.engine)
        self.corrected = masters(self.engine)

    def step(self, number: int) -> int:
        """Trains one step and updates; what the update sends."""
        train(self.engine, number - 1)
        with CommDebugMode() as communication:
            self.averaged.update_parameters(self.engine.module)
        reached = POWERS["lag"] + float(number)
        momentum, scale = reached ** -POWERS["ema_power"], reached ** -POWERS["bias_power"]
        for name, now in masters(self.engine).items():
            self.average[name].mul_(1 - momentum).add_(now, alpha=momentum)
            self.corrected[name] = self.average[name] + scale * (now - self.initial[name])
        sent: int = communication.get_total_counts()
        return sent

    def problems(self) -> dict[str, list[str]]:
        weights, read = self.averaged.weights, self.averaged.corrected(self.engine.module)
        initial = dict(self.averaged.initial.named_parameters())  # type: ignore[union-attr]
        return {
            "average": differing(pieces(weights, self.average), self.average),
            "corrected": differing(pieces(read, self.corrected), self.corrected),
            "initial": differing(pieces(initial, self.initial), self.initial),
        }


def pieces(tensors: Any, names: Tensors) -> Tensors:
    return {name: local(tensors[name]).detach() for name in names}


def averages(bf16: bool) -> list[dict[str, list[str]]]:
    training = Training(bf16)
    found = [training.problems()]
    for number in range(1, STEPS + 1):
        assert training.step(number) == 0
        found.append(training.problems())
    moved = differing(training.corrected, training.average)
    assert {name.split(".")[0] for name in moved} >= {"first", "last", "norm"}
    return found


@pytest.mark.parametrize("bf16", [True, False])
def test_it_is_the_formula_over_the_float32_pieces(deepspeed_ranks: Ranks, bf16: bool) -> None:
    for found in deepspeed_ranks.run(averages, bf16):
        assert not [problems for problems in found if any(problems.values())]


def read_out(bf16: bool) -> None:
    training = Training(bf16)
    for number in range(1, STEPS + 1):
        training.step(number)
    engine, averaged = training.engine, training.averaged
    own, said = bits_of(engine), outputs(engine)
    plain = network()
    read = averaged.corrected(engine.module)
    plain.load_state_dict({name: whole(one) for name, one in read.items()})
    expected = outputs(plain.bfloat16() if bf16 else plain)
    assert not alike(expected, said)
    with averaged.swapped_corrected(engine.module):
        assert alike(outputs(engine), expected)
    assert not differing(bits_of(engine), own)
    assert alike(outputs(engine), said)
    train(engine, STEPS)


@pytest.mark.parametrize("bf16", [True, False])
def test_passes_inside_swapped_corrected_see_what_is_read_out(
    deepspeed_ranks: Ranks, bf16: bool
) -> None:
    deepspeed_ranks.run(read_out, bf16)


def saved(folder: Path) -> tuple[Tensors, Tensors]:
    """Whole averages, of which a checkpoint is written, and those one step later."""
    training = Training()
    for number in range(1, STEPS + 1):
        training.step(number)
    training.engine.save_checkpoint(str(folder / "engine"), tag="saved")
    state = averaged_state_dict(training.averaged, training.engine.module)
    checkpoints.save(state, folder / "averaged")
    now = whole_state(training)
    training.step(STEPS + 1)
    return now, whole_state(training)


def whole_state(training: Training) -> Tensors:
    return {name: whole(one) for name, one in training.averaged.state_dict().items()}


def loaded(folder: Path, goes_on: bool) -> list[Tensors]:
    training = Training(seed=5)
    state = averaged_state_dict(training.averaged, training.engine.module)
    checkpoints.load(state, folder / "averaged")
    load_averaged_state_dict(training.averaged, training.engine.module, state)
    found = [whole_state(training)]
    if goes_on:
        training.engine.load_checkpoint(str(folder / "engine"), tag="saved")
        training.step(STEPS + 1)
        found.append(whole_state(training))
    return found


def test_it_is_resumed_to_the_bit_and_loaded_by_another_number_of_processes(
    deepspeed_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
) -> None:
    (now, later), (now_there, later_there) = deepspeed_ranks.run(saved, tmp_path)
    assert not differing(now, now_there) and not differing(later, later_there)
    assert "initial.first.weight" in now and len(differing(now, later)) > 5
    for before, after in deepspeed_ranks.run(loaded, tmp_path, True):
        assert not differing(before, now)
        assert not differing(after, later)
    for [found] in four_ranks.run(loaded, tmp_path, False):
        assert not differing(found, now)
