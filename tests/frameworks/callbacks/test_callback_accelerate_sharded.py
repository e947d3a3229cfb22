"""Averages in accelerate's loops, where FSDP or DeepSpeed shards the model, or DDP copies it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ema_fused.converting import read_average
from ema_fused.converting.average_state import whole
from tests.frameworks.callbacks import accelerate_sharded_run as loops
from tests.frameworks.callbacks.sharded_trainings import differing
from tests.ranks import Ranks


@pytest.mark.parametrize("way", ["ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_registered_average_is_saved_and_loaded_to_the_bit(
    two_trainers: Ranks, four_trainers: Ranks, tmp_path: Path, way: str
) -> None:
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    processes = two_trainers.run(loops.trained, tmp_path, way)
    for facts in processes:
        # Two batches to a step; and what was loaded goes on, but for FSDP1.
        assert facts["updated"] == [False, True] * (4 if way == "fsdp1" else 6)
        assert facts["collectives"] == 0
        problems = ("by hand", "loaded", "again", "warned")
        assert not any(facts.get(name) for name in problems), facts
        assert facts["steps"] == 4
        assert facts["kept"]
        # Under ZeRO-3 accelerate writes what is swapped in, elsewhere averages by themselves.
        has_module = way not in ("fsdp1", "zero3")
        assert ("save averaged.module" in facts["said"]) == has_module
    averages = processes[0]["averages"]
    for path in (tmp_path / "checkpoint", tmp_path / "checkpoint" / "averaged"):
        state = read_average(path)
        assert (state.format, state.steps) == ("ema_fused", 2)
        read = {name: whole(one) for name, one in state.averaged.items()}
        assert differing(read, averages[1]) == []
        # Of the weights those that DeepSpeed has written, in files of its own, are not read.
        has_raw = not way.startswith("zero") and path.name == "checkpoint"
        assert (state.raw is not None) == has_raw
    for folder in ("exported", "saved"):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert differing(written, averages[3]) == []
    # DeepSpeed itself loads its optimizer in as many processes alone.
    others = [two_trainers] if way.startswith("zero") else [two_trainers, four_trainers]
    found = [ranks.run(loops.loaded, tmp_path, way, "averaged") for ranks in others]
    for tensors, warned in chain.from_iterable(found):
        assert warned == []
        for name, average in averages[1].items():
            assert torch.equal(tensors[name], average)
            assert not torch.equal(tensors[f"own {name}"], average)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero2"])
def test_a_checkpoint_without_it_starts_the_average_from_its_weights(
    two_trainers: Ranks, tmp_path: Path, way: str
) -> None:
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    two_trainers.run(loops.trained, tmp_path, way)
    (first, warned), (second, silent) = two_trainers.run(loops.loaded, tmp_path, way, "other")
    assert len(warned) == 1 and "no folder 'other'" in warned[0]
    assert silent == []
    for tensors in (first, second):
        names = [name for name in tensors if not name.startswith("own ")]
        assert all(torch.equal(tensors[name], tensors[f"own {name}"]) for name in names)


def test_an_average_that_accelerate_would_pickle_is_refused(
    two_trainers: Ranks, tmp_path: Path
) -> None:
    (said, first, still), (_, second, loaded) = two_trainers.run(loops.pickled, tmp_path)
    assert "call register_average(accelerator, average, model)" in said
    assert torch.equal(first, still)
    # What would have happened: the second process gets the first one's rows.
    assert not torch.equal(second, loaded)
    assert torch.equal(loaded, first)


def test_steps_that_deepspeed_skips_are_not_counted(two_trainers: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for updated, steps in two_trainers.run(loops.overflowed, tmp_path):
        assert not any(updated[::2])  # between the batches of a step
        steps_made = updated[1::2]
        assert 0 < steps == sum(steps_made) < len(steps_made)
        assert steps_made == sorted(steps_made)  # the scale comes down until nothing overflows
