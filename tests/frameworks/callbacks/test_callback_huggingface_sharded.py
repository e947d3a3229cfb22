"""Our callback in transformers' real Trainer, where FSDP or DeepSpeed shards the model.

Beside averages computed in plain torch from the whole weights of every step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.converting import inspect, read_average
from ema_fused.converting.average_state import whole
from ema_fused.saving import checkpoints
from tests import ranks
from tests.frameworks.callbacks import ended_trainings
from tests.frameworks.callbacks import sharded_trainings as trainings
from tests.frameworks.callbacks.conftest import SHARDED
from tests.frameworks.callbacks.sharded_trainings import differing, loaded
from tests.ranks import Ranks

WAYS = ["ddp", "fsdp2", "fsdp2full", "fsdp1", "zero1bf16", "zero2", "zero3bf16"]
SPREAD = {"fsdp2", "fsdp2full", "fsdp1", "zero3bf16"}


@pytest.fixture(scope="module", params=WAYS)
def trained(
    request: pytest.FixtureRequest, two_trainers: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[dict[str, Any]]]:
    """The way, the folder of a training with checkpoints, and what each process saw."""
    way = request.param
    if way.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    folder = tmp_path_factory.mktemp(way)
    return way, folder, two_trainers.run(trainings.course, folder, way)


Trained = tuple[str, Path, list[dict[str, Any]]]


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


def loaded_shards(folder: Path) -> dict[str, torch.Tensor]:
    """The average of all processes' shards, of a plain model in this one."""
    plain = trainings.model()
    average = AveragedWeights(plain, trainings.MOMENTUM)
    state = average.state_dict()
    checkpoints.load({"averaged": state}, folder)
    average.load_state_dict(state)
    return {name: average.weights[name] for name, _ in plain.named_parameters()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_folder_says_what_it_holds_and_one_process_loads_it(trained: Trained) -> None:
    way, folder, (facts, _) = trained
    at = folder / "checkpoint-4" / "averaged"
    told = json.loads((at / "averaged.json").read_text())
    assert "AVERAGED" in told["about"]
    assert (told["steps"], told["global_step"], told["processes"]) == (4, 4, 2)
    assert told["momentum"] == trainings.MOMENTUM
    assert (at / told["for resuming"]).exists()
    if way in SPREAD:
        assert differing(loaded_shards(at / told["for resuming"]), facts["averages"][3]) == []
    # As the Trainer's own checkpoint of the model.
    is_gathered = way not in ("fsdp2", "fsdp1")
    assert bool(list(at.glob("model*.safetensors"))) == is_gathered
    if is_gathered:
        assert told["for from_pretrained"] == ["model.safetensors"]
        assert differing(loaded(at), facts["averages"][3]) == []
    assert differing(loaded(folder / "exported"), facts["averages"][1]) == []
    assert not [path for path in folder.rglob("*") if ".partial" in path.name]


def test_a_checkpoint_is_read_without_the_trainer(trained: Trained) -> None:
    way, folder, (facts, _) = trained
    checkpoint = folder / "checkpoint-4"
    for path in (checkpoint, checkpoint / "averaged"):
        state = read_average(path)
        # Of shards it is the average's own state; of whole ones a model and the rest.
        assert (state.format == "ema_fused") == (way in SPREAD)
        assert state.steps == 4
        averages = {name: whole(one) for name, one in state.averaged.items()}
        assert differing(averages, facts["averages"][3]) == []
        if way.startswith("fsdp"):
            assert state.raw is not None and state.raw.keys() == state.averaged.keys()
    if way.startswith("fsdp"):
        found = inspect(checkpoint)
        assert found.compared_with == "the weights of the model"
        assert found.total.distance and not found.only_here and not found.never_updated


def test_a_training_is_resumed_to_the_bit(trained: Trained, two_trainers: Ranks) -> None:
    way, folder, (facts, _) = trained
    for process in two_trainers.run(trainings.resumed, folder, way, 4):
        assert differing(process["at start"], facts["averages"][3]) == []
        assert process["steps"] == 6
        assert process["warned"] == process["by hand"] == []
        # Of FSDP1 accelerate resumes the optimizer otherwise, with the callback or without.
        if way != "fsdp1":
            assert differing(process["average"], facts["averages"][5]) == []
    if way not in ("ddp", "fsdp1", "fsdp2", "zero3bf16"):
        return
    # The same without an average, and with one that a killed program has left.
    at = folder / "checkpoint-6" / "averaged"
    (at.parent / "averaged.partial").mkdir()
    with pytest.raises(AssertionError, match=r"killed while it saved into .*checkpoint-6"):
        two_trainers.run(trainings.resumed, folder, way, 6)
    (at.parent / "averaged.partial").rmdir()
    shutil.rmtree(at)
    first, second = two_trainers.run(trainings.resumed, folder, way, 6, 8)
    assert len(first["warned"]) == 1 and "one begins here" in first["warned"][0]
    assert second["warned"] == []
    assert first["steps"] == second["steps"] == 2
    assert first["by hand"] == second["by hand"] == []


@pytest.mark.parametrize("trained", ["fsdp2", "fsdp1"], indirect=True)
def test_another_number_of_processes_goes_on_with_the_average(
    trained: Trained, four_trainers: Ranks
) -> None:
    way, folder, (facts, _) = trained
    for process in four_trainers.run(trainings.resumed, folder, way, 4):
        assert differing(process["at start"], facts["averages"][3]) == []
        assert process["steps"] == 6
        assert process["by hand"] == []


def killed(folder: Path, way: str, moment: str) -> None:
    with (
        ranks.started(2, imported=SHARDED) as dying,
        pytest.raises(AssertionError, match="a process ended"),
    ):
        dying.run(ended_trainings.killed, folder, way, moment)
    assert (folder / "died").exists()


@pytest.mark.parametrize(
    ("trained", "moment"),
    [("fsdp2", "step"), ("fsdp2", "update"), ("zero3bf16", "step")],
    indirect=["trained"],
)
def test_killed_within_a_step_it_goes_on_from_the_last_checkpoint_to_the_bit(
    trained: Trained, two_trainers: Ranks, four_trainers: Ranks, tmp_path: Path, moment: str
) -> None:
    way, _, (facts, _) = trained
    killed(tmp_path, way, moment)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    if moment == "update":  # elsewhere two resume as four do
        for process in four_trainers.run(trainings.resumed, tmp_path, way, None):
            assert differing(process["at start"], facts["averages"][3]) == []
            assert process["steps"] == 6
            assert process["by hand"] == []
    for process in two_trainers.run(trainings.resumed, tmp_path, way, None):
        made = [process["at start"], *process["averages"]]
        for average, expected in zip(made, facts["averages"][3:], strict=True):
            assert differing(average, expected) == []
        assert differing(process["average"], facts["averages"][5]) == []
        assert process["steps"] == 6


@pytest.mark.parametrize("trained", ["fsdp2"], indirect=True)
def test_a_killed_save_leaves_the_checkpoint_before(
    trained: Trained, two_trainers: Ranks, tmp_path: Path
) -> None:
    way, _, (facts, _) = trained
    killed(tmp_path, way, "save")
    assert not (tmp_path / "checkpoint-4" / "averaged").exists()
    assert (tmp_path / "checkpoint-4" / "averaged.partial").exists()
    # The Trainer refuses a checkpoint without its last file.
    with pytest.raises(AssertionError, match=r"No such file.*checkpoint-4/trainer_state.json"):
        two_trainers.run(trainings.resumed, tmp_path, way, 4)
    for process in two_trainers.run(trainings.resumed, tmp_path, way, 2):
        assert differing(process["at start"], facts["averages"][1]) == []
        assert differing(process["average"], facts["averages"][5]) == []


def ends(losses: list[float]) -> tuple[int, int]:
    """The step at which a training ends whose losses have got worse twice, and the best step."""
    best = 1
    for step, loss in enumerate(losses, 1):
        if loss < losses[best - 1]:
            best = step
        elif step - best == 2:
            return step, best
    return len(losses), best


def test_all_processes_stop_early_by_the_averages_metric(
    two_trainers: Ranks, tmp_path: Path
) -> None:
    for facts in two_trainers.run(ended_trainings.stopped_early, tmp_path, "fsdp2"):
        assert facts["losses"] == pytest.approx(facts["expected"], rel=1e-5)
        assert (facts["stopped"], facts["best"]) == ends(facts["expected"])
        assert facts["stopped"] == len(facts["losses"]) < ended_trainings.STEPS_AT_MOST
        assert ends(facts["own"]) < ends(facts["expected"])  # another course with those
        assert facts["unequal"] == []
        assert facts["average at best"] == facts["model at best"] == []


@pytest.mark.parametrize("way", ["fsdp2", "ddp"])
def test_steps_that_a_scaler_skips_are_not_counted(
    two_trainers: Ranks, tmp_path: Path, way: str
) -> None:
    for process in two_trainers.run(trainings.skipping, tmp_path, way, {0, 3}):
        assert process["steps"] == process["recorded"] == 4
        assert process["differing"] == []


def test_adapters_and_tokenizer_are_written_as_they_write_themselves(
    two_trainers: Ranks, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    averages, _ = two_trainers.run(trainings.adapters, tmp_path)
    for folder in (tmp_path / "checkpoint-2" / "averaged", tmp_path / "exported"):
        files = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "tokenizer_config.json"} <= files
        written = load_file(folder / "adapter_model.safetensors")
        plain = {name.replace(".default", ""): one for name, one in averages.items()}
        assert differing(written, plain) == []
        assert len(written) == 4


@pytest.mark.parametrize(
    ("way", "average", "said"),
    [
        ("fsdp2", {"average": ExponentialMovingAverage}, "ema_fused.AveragedWeights"),
        ("fsdp1", {"average": ExponentialMovingAverage}, "ema_fused.AveragedWeights"),
        ("fsdp1", {"averaged_dtype": torch.bfloat16}, "leave averaged_dtype out"),
    ],
)
def test_what_cannot_be_averaged_is_said_as_training_begins(
    two_trainers: Ranks, tmp_path: Path, way: str, average: dict[str, Any], said: str
) -> None:
    for message in two_trainers.run(trainings.refused, tmp_path, way, average):
        assert said in message
