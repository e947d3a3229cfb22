"""On GPUs: our callback in transformers' own Trainer, whose model FSDP2 or DeepSpeed shards."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import device, ranks
from tests.ranks import Ranks

PROGRAM = "tests.frameworks.callbacks.sharded_trainings"
trainings: Any = pytest.importorskip(PROGRAM)  # skips where transformers, say, is missing

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

_NEEDS = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """So many, each with a GPU of its own."""
    if request.param > 1:
        device.needs("several devices: of processes without one the callback's own tests show it")
    device.needs_devices(request.param)
    with ranks.started(request.param, imported=[PROGRAM], kind=device.DEVICE) as started:
        yield started


@pytest.mark.parametrize(
    ("processes", "way"),
    [(1, "ddp"), (1, "fsdp2"), pytest.param(1, "zero3bf16", marks=_NEEDS), (2, "fsdp2")],
    indirect=["processes"],
)
def test_averages_are_those_of_the_recorded_weights_to_the_bit(
    processes: Ranks, tmp_path: Path, way: str
) -> None:
    # In 16 bits the losses that are compared are rounded elsewhere.
    close = 2e-3 if way.endswith("bf16") else 1e-4
    first, *others = processes.run(trainings.course, tmp_path, way)
    recorded = first["averages"]
    for facts in (first, *others):
        assert facts["devices"] == {device.DEVICE}
        assert facts["steps"] == 6
        assert facts["collectives"] == 0
        for step, loss in facts["losses"].items():
            assert loss == pytest.approx(facts["expected"][step], rel=close)
            assert loss != pytest.approx(facts["own"][step], rel=0.01)
        assert facts["unequal"] == [] and facts["unchanged"]
        assert facts["best"] == facts["steps at best"] == 2
        assert facts["average at best"] == facts["model at best"] == []
    exported = trainings.loaded(tmp_path / "exported")
    assert trainings.differing(exported, recorded[1]) == []
    # Gradients may differ from run to run: what follows the checkpoint is recorded anew.
    for facts in processes.run(trainings.resumed, tmp_path, way, 4):
        assert trainings.differing(facts["at start"], recorded[3]) == []
        assert facts["steps"] == 6
        assert facts["by hand"] == facts["warned"] == []
