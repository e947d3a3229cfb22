"""torchtitan's EMA on shards: beside foreach on DTensors to the bit, checkpoints both ways."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused import AveragedWeights
from ema_fused.adapters.torchtitan_keys import from_torchtitan, to_torchtitan
from ema_fused.engine.dtensors import is_sharded, local
from tests import sharded_models
from tests.frameworks import originals, titan
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread, whole

pytestmark = [
    pytest.mark.skipif(
        not all((originals._UNPACKED / pin).is_dir() for pin in titan.PINS),
        reason="torchtitan isn't unpacked: `make test` does it",
    )
]
PATTERNS = ("running_",)
STEPS = 5


class Run:
    """A sharded model in two parts, as of a pipeline, and its training."""

    def __init__(self, way: str | None = "fsdp2") -> None:
        self.way = way
        made = [perceptron(seed) for seed in range(2)]
        self.models = made if way is None else [spread(one, way) for one in made]
        self.parts: list[nn.Module] = [
            nn.ModuleDict({str(i): model}) for i, model in enumerate(self.models)
        ]
        self.optimizers = [sharded_models.trainer(model) for model in self.models]

    def step(self, number: int) -> None:
        assert self.way is not None
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            sharded_models.train(model, optimizer, number, self.way)
            for buffer in model.buffers():  # equal in all processes, as a bias of experts is
                dist.broadcast(buffer, 0)

    def average(self, **options: Any) -> Any:
        titan.import_torchtitan()
        from ema_fused.adapters.torchtitan import EMA

        return EMA.Config(buffer_patterns=[*PATTERNS], **options).build(model_parts=self.parts)

    def restated(self) -> Any:
        return titan.restated(self.parts, patterns=PATTERNS)


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The keys whose shards in this process differ, or where only one of the two is sharded."""
    return [
        key
        for key in {**ours, **theirs}
        if key not in ours
        or key not in theirs
        or is_sharded(ours[key]) != is_sharded(theirs[key])
        or not torch.equal(local(ours[key]), local(theirs[key]))
    ]


def steps_beside(way: str, **options: Any) -> list[str]:
    run = Run(way)
    ours, theirs = run.average(**options), run.restated()
    found = []
    for number in range(1, STEPS + 1):
        run.step(number)
        theirs.step(number)
        with CommDebugMode() as communication:
            ours.step(number)
        if communication.get_total_counts():
            found.append(f"step {number} communicates: {communication.get_comm_counts()}")
        found += [f"{number}: {key}" for key in different(ours.state_dict(), theirs.state_dict())]
    if not options and (launches := ours._updates.plan(ours._find).launches) != 1:
        found.append(f"{launches} launches")
    return found


@pytest.mark.parametrize("options", [{}, {"offload_to_cpu": True}], ids=["here", "offloaded"])
@pytest.mark.parametrize("way", ["fsdp2", "fsdp2_kept", "tensor_parallel"])
def test_shards_are_equal_to_the_bit_without_communication(
    two_ranks: Ranks, way: str, options: dict[str, Any]
) -> None:
    assert two_ranks.run(partial(steps_beside, way, **options)) == [[], []]


def test_four_processes_some_without_a_row(four_ranks: Ranks) -> None:
    assert four_ranks.run(steps_beside, "fsdp2") == [[]] * 4


def an_update_after_an_evaluation() -> list[str]:
    run = Run("fsdp2_kept")
    ours, theirs = run.average(), run.restated()
    run.step(1)
    theirs.step(1)
    for model in run.models:
        model.eval()
        with torch.no_grad():
            model(torch.ones(2, 7))  # gathered, and no backward pass frees it
    assert not any(is_sharded(p) for model in run.models for p in model.parameters())
    ours.step(1)
    return different(ours.state_dict(), theirs.state_dict())


def test_parameters_gathered_by_an_evaluation_are_dropped_first(two_ranks: Ranks) -> None:
    assert two_ranks.run(an_update_after_an_evaluation) == [[], []]


def an_update_of_both_kinds() -> list[str]:
    run = Run("tensor_parallel")  # a norm's weights are no DTensors
    parameters = [p.detach() for part in run.parts for p in part.parameters()]
    averages = [parameter.clone() for parameter in parameters]
    try:
        torch._foreach_lerp_(averages, parameters, 0.5)
    except RuntimeError as error:
        refused = str(error)
    run.average().step(1)
    return [refused]


def test_a_model_of_dtensors_and_plain_tensors_is_averaged_where_foreach_refuses_it(
    two_ranks: Ranks,
) -> None:
    for (refused,) in two_ranks.run(an_update_of_both_kinds):
        assert "got mixed torch.Tensor and DTensor" in refused


# ---- Checkpoints ---------------------------------------------------------------------------------


def save(folder: str, kind: str) -> dict[str, Tensor]:
    """Trains, averages and saves; the whole averages."""
    run = Run()
    ours, theirs = run.average(offload_to_cpu=kind == "offloaded"), run.restated()
    for number in range(1, STEPS + 1):
        run.step(number)
        for ema in (ours, theirs):
            ema.step(number)
    saved = theirs if kind == "torchtitan" else ours
    dcp.save({"ema": saved}, checkpoint_id=folder)
    return {key: whole(value) for key, value in theirs.state_dict().items()}


def load(folder: str, kind: str) -> dict[str, Tensor]:
    """Loads into another model's averages; the whole averages."""
    run = Run()
    run.step(0)
    ema = run.restated() if kind == "torchtitan" else run.average(offload_to_cpu=kind != "ours")
    dcp.load({"ema": ema}, checkpoint_id=folder)
    return {key: whole(value) for key, value in ema.state_dict().items()}


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [("ours", "torchtitan"), ("torchtitan", "ours"), ("offloaded", "offloaded")],
)
def test_checkpoints_are_read_both_ways_on_other_numbers_of_ranks(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, saved_by: str, loaded_by: str
) -> None:
    folder = str(tmp_path)
    expected = two_ranks.run(save, folder, saved_by)[0]
    for found in four_ranks.run(load, folder, loaded_by):
        assert different(found, expected) == []
    run = Run(way=None)
    one: Any = run.restated() if loaded_by == "torchtitan" else run.average()
    dcp.load({"ema": one}, checkpoint_id=folder, no_dist=True)
    assert different(one.state_dict(), expected) == []


def refused() -> list[str]:
    run = Run()
    ema = run.average()
    before = {key: value.clone() for key, value in ema.state_dict().items()}
    messages = []
    gathered = {key: whole(value) + 1 for key, value in before.items()}
    elsewhere = {
        key: value.redistribute(placements=[torch.distributed.tensor.Replicate()])
        if is_sharded(value)
        else value
        for key, value in before.items()
    }
    for state in (gathered, elsewhere):
        try:
            ema.load_state_dict(state)
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    assert different(ema.state_dict(), before) == []
    return messages


def test_values_in_another_layout_are_refused(two_ranks: Ranks) -> None:
    for plain, elsewhere in two_ranks.run(refused):
        assert plain.startswith("TypeError: state.0.scale.ema_params isn't a DTensor")
        assert elsewhere.startswith("ValueError: state.0.scale.ema_params is placed as ")


def by_the_manager(folder: str) -> list[str]:
    """torchtitan's own checkpoints of a run, which is then resumed."""
    run = Run()
    ours, theirs = run.average(), run.restated()
    manager = manager_of(run, ours, folder)
    for number in range(1, STEPS + 1):
        run.step(number)
        for ema in (ours, theirs):
            ema.step(number)
    manager.save(STEPS)
    resumed = Run()
    average = resumed.average()
    assert manager_of(resumed, average, folder).load()
    found = different(average.state_dict(), theirs.state_dict())
    for number in range(STEPS + 1, STEPS + 3):
        resumed.step(number)
        run.step(number)
        average.step(number)
        theirs.step(number)
    return found + different(average.state_dict(), theirs.state_dict())


def manager_of(run: Run, ema: Any, folder: str) -> Any:
    from torchtitan.components.checkpointer import CheckpointManager

    config = CheckpointManager.Config(enable=True, interval=1, keep_latest_k=0)
    optimizers: Any = Momenta(run.optimizers)
    return CheckpointManager(
        config,
        dataloader=None,
        model_parts=run.parts,
        optimizers=optimizers,
        lr_schedulers=Momenta([]),  # type: ignore[arg-type]
        states={"ema": ema},
        sd_adapter=None,
        base_folder=folder,
    )


class Momenta:
    """What a checkpoint has of optimizers with momentum, by numbers."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for i, optimizer in enumerate(self.optimizers):
            for j, parameter in enumerate(optimizer.param_groups[0]["params"]):
                state = optimizer.state[parameter]
                state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                states[f"{i}.{j}"] = state["momentum_buffer"]
        return states

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """The tensors of :meth:`state_dict` have been loaded into."""


def test_torchtitans_checkpoint_manager_saves_and_resumes_it(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    assert two_ranks.run(by_the_manager, str(tmp_path)) == [[], []]


# ---- AveragedWeights -----------------------------------------------------------------------------


def momentum(step: int) -> float:
    """torchtitan's, of the update after ``step`` others."""
    return float(1.0 - 2.0 ** (-1.0 / (0.05 * (step + 1))))


def other_averages(folder: str) -> list[str]:
    """From torchtitan's checkpoint to averages of ours, three steps, and back."""
    run = Run()
    theirs = run.restated()
    averages = [
        AveragedWeights(part, momentum, update_buffers=[*PATTERNS], share_frozen=True)
        for part in run.parts
    ]
    for number in range(1, 4):
        run.step(number)
        theirs.step(number)
    dcp.save({"ema": theirs}, checkpoint_id=f"{folder}/theirs")
    state = {key: value for average in averages for key, value in to_torchtitan(average).items()}
    found = [f"names: {key}" for key in set(state) ^ set(theirs.state_dict())]
    dcp.load({"ema": state}, checkpoint_id=f"{folder}/theirs")
    for i, average in enumerate(averages):
        part = {key: value for key, value in state.items() if key.startswith(f"state.{i}.")}
        average.load_state_dict(from_torchtitan(part, average, steps=3))
    for number in range(4, 7):
        run.step(number)
        theirs.step(number)
        for average, model in zip(averages, run.parts, strict=True):
            average.update_parameters(model)
    state = {key: value for average in averages for key, value in to_torchtitan(average).items()}
    found += different(state, theirs.state_dict())
    dcp.save({"ema": state}, checkpoint_id=f"{folder}/ours")
    again = Run().restated()
    dcp.load({"ema": again}, checkpoint_id=f"{folder}/ours")
    return found + different(again.state_dict(), theirs.state_dict())


def test_averaged_weights_go_on_with_torchtitans_averages_and_back(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    assert two_ranks.run(other_averages, str(tmp_path)) == [[], []]


CHOICES: list[dict[str, Any]] = [{"exclude": r"last|scale"}, {"include": [r"first\.", "norm"]}]
LEFT_OUT = {"last.weight", "last.bias", "scale"}


class Choice:
    """Averages of a part of the weights, and torchtitan's of all, of the same training."""

    def __init__(self, choice: dict[str, Any]) -> None:
        self.run = Run()
        self.theirs = self.run.restated()
        self.averages = [
            AveragedWeights(part, momentum, update_buffers=[*PATTERNS], **choice)
            for part in self.run.parts
        ]

    def state(self) -> dict[str, Tensor]:
        return {
            key: one for average in self.averages for key, one in to_torchtitan(average).items()
        }

    def step(self, number: int) -> None:
        self.run.step(number)
        self.theirs.step(number)
        for average, part in zip(self.averages, self.run.parts, strict=True):
            average.update_parameters(part)

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        for i, average in enumerate(self.averages):
            part = {key: one for key, one in state.items() if key.startswith(f"state.{i}.")}
            average.load_state_dict(from_torchtitan(part, average, steps=steps))

    def differing(self) -> list[str]:
        """What isn't as torchtitan's average has it, or isn't the model's own if it is left out."""
        theirs = self.theirs.state_dict()
        found = different(self.state(), {key: theirs[key] for key in self.state()})
        missing = {key.split(".", 2)[2].removesuffix(".ema_params") for key in theirs}
        missing -= {key.split(".", 2)[2].removesuffix(".ema_params") for key in self.state()}
        found += [f"names: {name}" for name in missing ^ LEFT_OUT]
        for i, (average, model) in enumerate(zip(self.averages, self.run.models, strict=True)):
            own = dict(model.named_parameters())
            for name in LEFT_OUT:
                ours = average.weights[f"{i}.{name}"]
                if local(ours).data_ptr() != local(own[name]).data_ptr():
                    found.append(f"not the model's own: {name}")
        return found


def averages_of_a_part(folder: str, choice: dict[str, Any]) -> list[str]:
    """From torchtitan's checkpoint of all to averages of a part, three steps, and saved again."""
    training = Choice(choice)
    for number in range(1, 4):
        training.run.step(number)
        training.theirs.step(number)
    dcp.save({"ema": training.theirs}, checkpoint_id=f"{folder}/theirs")
    state = training.state()
    dcp.load({"ema": state}, checkpoint_id=f"{folder}/theirs")
    training.load(state, steps=3)
    found = training.differing()
    for number in range(4, 7):
        training.step(number)
    found += training.differing()
    # All of torchtitan's at once: what is left out isn't taken.
    training.load({key: one.clone() for key, one in training.theirs.state_dict().items()}, steps=6)
    found += training.differing()
    dcp.save({"ema": training.state()}, checkpoint_id=f"{folder}/ours")
    return found


def taken_back(folder: str, choice: dict[str, Any]) -> tuple[list[str], str, dict[str, Tensor]]:
    """Loads what :func:`averages_of_a_part` saved, here and by torchtitan's container."""
    training = Choice(choice)
    state = training.state()
    dcp.load({"ema": state}, checkpoint_id=f"{folder}/ours")
    training.load(state, steps=6)
    found = [] if {int(average.steps) for average in training.averages} == {6} else ["steps"]
    before = {key: one.clone() for key, one in training.theirs.state_dict().items()}
    try:
        dcp.load({"ema": training.theirs}, checkpoint_id=f"{folder}/ours")
        said = ""
    except CheckpointException as error:
        said = str(error)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load({"ema": training.theirs}, checkpoint_id=f"{folder}/ours", planner=planner)
    after = training.theirs.state_dict()
    found += different({key: after[key] for key in state}, training.state())
    rest = after.keys() - state.keys()
    found += different({key: after[key] for key in rest}, {key: before[key] for key in rest})
    return found, said, {key: whole(one) for key, one in training.state().items()}


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_averages_of_a_part_of_the_weights_have_its_keys_and_take_its_values(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, choice: dict[str, Any]
) -> None:
    assert two_ranks.run(averages_of_a_part, str(tmp_path), choice) == [[], []]
    expected = None
    for ranks in (two_ranks, four_ranks):
        for found, said, values in ranks.run(taken_back, str(tmp_path), choice):
            assert found == []
            assert "Missing key in checkpoint state_dict: ema.state.0." in said
            expected = expected or values
            assert different(values, expected) == []
