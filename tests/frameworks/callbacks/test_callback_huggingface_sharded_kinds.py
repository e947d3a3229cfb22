"""Our callback where FSDP2 or DeepSpeed shards the model: averages of some tensors, and BEMA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.callbacks import sharded_kinds as kinds
from tests.frameworks.callbacks.sharded_trainings import differing
from tests.frameworks.callbacks.test_callback_huggingface_sharded import loaded
from tests.ranks import Ranks

TRAINED = [
    *(("zero3bf16", choice) for choice in kinds.CHOICES if choice != "source"),
    ("zero2-of-masters-bf16", "source"),  # of the 16-bit weights' float32 copies, gathered
    ("zero3", "exclude"),
    ("fsdp2full", "include"),
    ("fsdp2full", "bema of some"),
    ("fsdp2", "bema"),
]


@pytest.mark.parametrize(("way", "choice"), TRAINED)
def test_they_are_the_formula_s_to_the_bit_and_resume_so(
    two_trainers: Ranks, tmp_path: Path, way: str, choice: str
) -> None:
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    close = 5e-4 if way.endswith("bf16") else 1e-5  # losses in 16 bits are rounded elsewhere
    processes = two_trainers.run(kinds.course, tmp_path, way, choice)
    for facts in processes:
        assert not any(facts["problems"].values()), facts["problems"]
        assert (facts["collectives"] == 0) is (choice != "source")
        assert facts["unequal"] == []
        assert len(facts["weights"]) == kinds.STEPS
        assert facts["losses"] == pytest.approx(facts["expected"], rel=close)
        if facts["read out"] is not None:
            loss, is_unchanged = facts["read out"]
            assert loss == pytest.approx(facts["corrected"], rel=close) and is_unchanged
            assert loss != pytest.approx(facts["losses"][kinds.STEPS], rel=0.01)
    wanted = kinds.averaged_alone(choice, processes[0]["averages"][-1])
    written = loaded(tmp_path / "exported")
    assert differing({name: written[name] for name in wanted}, wanted) == []
    before = processes[0]["weights"]
    for facts in two_trainers.run(kinds.resumed, tmp_path, way, choice, before):
        assert facts["steps"] == kinds.STEPS
        assert not any(facts["problems"].values()), facts["problems"]


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_a_callback_with_a_copy_of_the_model_says_which_has_none(
    two_trainers: Ranks, tmp_path: Path, way: str
) -> None:
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for message in two_trainers.run(kinds.refused, tmp_path, way):
        assert "EMACallback(ema_fused.BiasCorrectedEMA, ...).attach(trainer)" in message
