"""Our callback in transformers' real Trainer, where FSDP or DeepSpeed shards the model.

Beside averages computed in plain torch from the whole weights of every step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests import ranks
from tests.frameworks.callbacks import sharded_trainings as trainings
from tests.frameworks.callbacks.sharded_trainings import Tensors, differing
from tests.ranks import Ranks

WAYS = ["ddp", "fsdp2", "fsdp2full", "fsdp1", "zero1bf16", "zero2", "zero3bf16"]
SPREAD = {"fsdp2", "fsdp2full", "fsdp1", "zero3bf16"}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks.started(2, imported=trainings.IMPORTED) as processes:
        yield processes


@pytest.fixture(scope="module", params=WAYS)
def trained(
    request: pytest.FixtureRequest, two: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[dict[str, Any]]]:
    """The way, the folder of a training with checkpoints, and what each process saw."""
    way = request.param
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    folder = tmp_path_factory.mktemp(way)
    return way, folder, two.run(trainings.course, folder, way)


Trained = tuple[str, Path, list[dict[str, Any]]]


def loaded(folder: Path) -> Tensors:
    plain = LlamaForCausalLM.from_pretrained(folder)
    return {name: parameter.detach() for name, parameter in plain.named_parameters()}


def test_the_average_is_that_of_the_recorded_weights_to_the_bit(trained: Trained) -> None:
    way, _, (first, second) = trained
    for facts in (first, second):
        assert facts["steps"] == 6  # of twelve batches, two to a step
        assert facts["collectives"] == 0
        assert facts["kind"] == ("ExponentialMovingAverage" if way == "ddp" else "AveragedWeights")
    whole = [tuple(one.shape) for one in first["averages"][0].values()]
    if way in SPREAD:
        assert first["shapes"] != whole
    else:
        assert first["shapes"] == second["shapes"] == whole
    if way == "fsdp1":  # of some tensors one of the processes has nothing
        assert any(shape == (0,) for shape in second["shapes"])


def test_evaluations_measure_the_averages_and_leave_the_shards_alone(trained: Trained) -> None:
    way, _, processes = trained
    # In 16 bits the losses that are compared are rounded elsewhere.
    close = 5e-4 if way.endswith("bf16") else 1e-5
    for facts in processes:
        for step, loss in facts["losses"].items():
            assert loss == pytest.approx(facts["expected"][step], rel=close)
            assert loss != pytest.approx(facts["own"][step], rel=0.01)
        assert list(facts["losses"]) == [2, 4, 6]
        assert facts["losses"] == processes[0]["losses"]
        assert facts["unequal"] == []
        assert facts["unchanged"]
        assert facts["after"] == facts["predicted"] == facts["losses"][2]


def test_the_best_model_and_its_average_are_loaded_at_the_end(trained: Trained) -> None:
    _, _, processes = trained
    for facts in processes:
        assert facts["best"] == facts["steps at best"] == 2
        assert facts["average at best"] == facts["model at best"] == []


def test_the_folder_says_what_it_holds_and_one_process_loads_it(trained: Trained) -> None:
    way, folder, (facts, _) = trained
    at = folder / "checkpoint-4" / "averaged"
    told = json.loads((at / "averaged.json").read_text())
    assert "AVERAGED" in told["about"]
    assert (told["steps"], told["global_step"], told["processes"]) == (4, 4, 2)
    assert told["momentum"] == trainings.MOMENTUM
    assert (at / told["for resuming"]).exists()
    # As the Trainer's own checkpoint of the model.
    is_gathered = way not in ("fsdp2", "fsdp1")
    assert bool(list(at.glob("model*.safetensors"))) == is_gathered
    if is_gathered:
        assert told["for from_pretrained"] == ["model.safetensors"]
        assert differing(loaded(at), facts["averages"][3]) == []
    assert differing(loaded(folder / "exported"), facts["averages"][1]) == []
    assert not [path for path in folder.rglob("*") if ".partial" in path.name]


def test_a_training_is_resumed_to_the_bit(trained: Trained, two: Ranks) -> None:
    way, folder, (facts, _) = trained
    for process in two.run(trainings.resumed, folder, way, 4):
        assert differing(process["at start"], facts["averages"][3]) == []
        assert process["steps"] == 6
        assert process["warned"] == process["by hand"] == []
        # Of FSDP1 accelerate resumes the optimizer otherwise, with the callback or without.
        if way != "fsdp1":
            assert differing(process["average"], facts["averages"][5]) == []
    if way not in ("fsdp2", "ddp"):
        return
    # The same without an average, and with one that a killed program has left.
    at = folder / "checkpoint-6" / "averaged"
    (at.parent / "averaged.partial").mkdir()
    with pytest.raises(AssertionError, match=r"killed while it saved into .*checkpoint-6"):
        two.run(trainings.resumed, folder, way, 6)
    (at.parent / "averaged.partial").rmdir()
    shutil.rmtree(at)
    first, second = two.run(trainings.resumed, folder, way, 6, 8)
    assert len(first["warned"]) == 1 and "starts as a copy" in first["warned"][0]
    assert second["warned"] == []
    assert first["steps"] == second["steps"] == 2
    assert first["by hand"] == second["by hand"] == []
