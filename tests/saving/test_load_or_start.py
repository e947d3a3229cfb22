"""``checkpoints.load_or_start``: an average goes on, or begins where a checkpoint has none."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from ema_fused import AveragedWeights, ExponentialMovingAverage, PowerFunctionEMA, checkpoints
from tests.modules.sharded_beside import Beside, differing, state_of
from tests.networks import conv_net, differences, generator, own, run, snapshot, train
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread, whole_weights

KINDS = [ExponentialMovingAverage, AveragedWeights]


def trained(kind: Any, **options: Any) -> tuple[Any, nn.Module]:
    model = conv_net()
    averaged = kind(model, 0.25, **options)
    run(averaged, model, 3)
    return averaged, model


def saved(folder: Path, in_memory: bool, state: dict[str, Any]) -> Any:
    """A checkpoint with ``state``, as a file or as ``torch.load`` gives it."""
    if in_memory:
        torch.save(state, folder / "checkpoint.pt")
        return torch.load(folder / "checkpoint.pt")
    checkpoints.save(state, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"exclude": "head"}, {"share_frozen": True}, {"rounding": "stochastic", "seed": 7}],
    ids=str,
)
def test_an_average_that_is_there_is_loaded(
    kind: Any, in_memory: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    model = conv_net()
    model.conv.requires_grad_(False)
    averaged = kind(model, 0.25, **options)
    run(averaged, model, 3)
    state = checkpoints.averaged_state_dict(averaged, model)
    source = saved(tmp_path, in_memory, {"model": model.state_dict(), "averaged": state})
    fresh = kind(model, 0.25, **{**options, **({"seed": 1} if "seed" in options else {})})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.load_or_start(fresh, model, source) is True
    assert differences(own(fresh), own(averaged)) == []
    run(averaged, model, 1, seed=5)
    fresh.update_parameters(model)
    assert differences(own(fresh), own(averaged)) == []


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_copy_of_a_wrapped_model(in_memory: bool, tmp_path: Path) -> None:
    model = nn.DataParallel(conv_net())
    averaged = ExponentialMovingAverage(model, 0.25, exclude="head")
    run(averaged, model, 3)
    state = {"averaged": averaged.state_dict()}
    assert "module.module.hidden.weight" in state["averaged"]
    source = saved(tmp_path, in_memory, state)
    fresh = ExponentialMovingAverage(model, 0.25, exclude="head")
    assert checkpoints.load_or_start(fresh, model, source)
    assert differences(own(fresh), own(averaged)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("is_empty", [False, True])
def test_one_begins_where_there_is_none(
    kind: Any, in_memory: bool, is_empty: bool, tmp_path: Path
) -> None:
    _, model = trained(kind)
    state: dict[str, Any] = {"model": model.state_dict()}
    source = saved(tmp_path, in_memory, {**state, "averaged": {}} if is_empty else state)
    resumed = conv_net(seed=1)
    fresh = kind(resumed, 0.25)
    resumed.load_state_dict(model.state_dict())
    name = "the checkpoint" if in_memory else str(source)
    with pytest.warns(UserWarning) as seen:
        assert checkpoints.load_or_start(fresh, resumed, source) is False
    assert [str(one.message) for one in seen] == [
        f"{name} has no average (key='averaged'), so one begins here, with the weights that the "
        f"model has now"
    ]
    assert seen[0].filename == __file__
    assert differences(snapshot(fresh.module), snapshot(model)) == []
    # It goes on as any new one: the first update copies, the next averages.
    assert fresh.steps == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fresh.swapped(resumed):
            assert differences(snapshot(resumed), snapshot(model)) == []
        random = generator(3)
        train(resumed, random)
        fresh.update_parameters(resumed)
        assert differences(snapshot(fresh.module), snapshot(resumed)) == []
        train(resumed, random)
        fresh.update_parameters(resumed)
    assert fresh.steps == 2
    assert not torch.equal(fresh.module.head.weight, resumed.head.weight)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("steps"),
            r"\('ema'\) isn't one of this model: it lacks steps\. L",
        ),
        (lambda state: state.pop("module.head.bias"), r"it lacks module\.head\.bias"),
        (
            lambda state: state.update({"module.head.bias": torch.ones(3)}),
            r"module\.head\.bias \(3,\) instead of \(31,\)",
        ),
    ],
)
def test_an_average_of_another_model_is_refused_and_nothing_loaded(
    in_memory: bool, change: Any, message: str, tmp_path: Path
) -> None:
    averaged, model = trained(AveragedWeights)
    state = dict(averaged.state_dict())
    change(state)
    source = saved(tmp_path, in_memory, {"ema": state})
    fresh = AveragedWeights(model)
    before = own(fresh)
    with pytest.raises(RuntimeError, match=message):
        checkpoints.load_or_start(fresh, model, source, key="ema")
    assert differences(own(fresh), before) == []


def test_files_that_cant_be_read_change_nothing(tmp_path: Path) -> None:
    averaged, model = trained(AveragedWeights)
    fresh = AveragedWeights(model)
    before = own(fresh)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*step-1"):
        checkpoints.load_or_start(fresh, model, tmp_path / "step-1")
    checkpoints.save({"averaged": averaged.state_dict()}, tmp_path / "step-1")
    file = next((tmp_path / "step-1").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointException):
        checkpoints.load_or_start(fresh, model, tmp_path / "step-1")
    assert differences(own(fresh), before) == []


def test_a_program_killed_between_two_renames_has_the_previous_checkpoint(tmp_path: Path) -> None:
    averaged, model = trained(AveragedWeights)
    path = tmp_path / "last"
    checkpoints.save({"averaged": averaged.state_dict()}, path)
    shutil.move(path, tmp_path / "last.previous")
    fresh = AveragedWeights(model)
    assert checkpoints.load_or_start(fresh, model, path)
    assert fresh.steps == 3


@pytest.mark.parametrize("in_memory", [False, True])
def test_power_function_averages(in_memory: bool, tmp_path: Path) -> None:
    model = conv_net()
    averages = PowerFunctionEMA(model)
    for _ in range(3):
        train(model, generator())
        averages.update_parameters(model)
    source = saved(tmp_path, in_memory, {"averaged": averages.state_dict(), "model": {}})
    fresh = PowerFunctionEMA(conv_net(seed=1))
    assert checkpoints.load_or_start(fresh, model, source)
    assert fresh.get_extra_state() == averages.get_extra_state()
    assert differences(snapshot(fresh), snapshot(averages)) == []
    other = PowerFunctionEMA(conv_net(seed=1))
    with pytest.warns(UserWarning, match="has no average"):
        assert not checkpoints.load_or_start(other, model, source, key="ema")
    assert differences(snapshot(other.averages[1]), snapshot(model)) == []


def test_an_average_made_on_meta(tmp_path: Path) -> None:
    averaged, model = trained(AveragedWeights)
    checkpoints.save({"averaged": averaged.state_dict()}, tmp_path / "last")
    with torch.device("meta"):
        empty = type(model)()
    fresh = AveragedWeights(empty)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert checkpoints.load_or_start(fresh, empty, tmp_path / "last")
    assert differences(own(fresh), own(averaged)) == []


def resumed_in(way: str, folder: str) -> list[str]:
    beside = Beside(way)
    for number in range(3):
        beside.step(number)
    model, path = beside.model, f"{folder}/{way}"
    state = checkpoints.averaged_state_dict(beside.averaged, model)
    checkpoints.save({"averaged": state}, path, check_replicas=False)
    problems = []

    def loaded(averaged: AveragedWeights, source: Any, key: str) -> tuple[bool, list[str]]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            answer = checkpoints.load_or_start(averaged, model, source, key=key)
        return answer, [str(one.message) for one in seen if "no average" in str(one.message)]

    kept, weights = state_of(beside.averaged, model), whole_weights(model)
    whole = checkpoints.averaged_state_dict(beside.averaged, model, full_state_dict=True)
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    for source in (path, {"averaged": whole}):
        fresh = AveragedWeights(model, 0.1)
        assert loaded(fresh, source, "averaged") == (True, [])
        found = differing(state_of(fresh, model), kept)
        problems += [name for name in found if "running_" not in name]
    problems += differing(whole_weights(model), weights)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    started, told = loaded(fresh, path, "ema")
    assert not started and len(told) == (1 if dist.get_rank() == 0 else 0)
    now = whole_weights(model)
    problems += [
        name
        for name, tensor in state_of(fresh, model).items()
        if name != "steps" and not torch.equal(tensor, now[name.removeprefix("module.")])
    ]
    # One process alone that lacks it stops all.
    before = state_of(fresh, model)
    mine = {"averaged": whole} if dist.get_rank() == 0 else {}
    try:
        checkpoints.load_or_start(fresh, model, mine)
        problems.append("half of the processes have loaded")
    except RuntimeError as error:
        assert "in process 1: it lacks steps, " in str(error)
    return problems + differing(state_of(fresh, model), before)


@pytest.mark.parametrize("way", ["fsdp2", "tensor_parallel", "fsdp1", "ddp"])
def test_all_processes_load_or_start_or_raise(two_ranks: Ranks, way: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert two_ranks.run(resumed_in, way, folder) == [[], []]


def fails_alike(folder: str) -> list[str]:
    model = spread(perceptron(), "fsdp2")
    try:
        checkpoints.load_or_start(AveragedWeights(model), model, f"{folder}/none")
    except (FileNotFoundError, RuntimeError) as error:
        return [str(error)]
    return []


def test_all_processes_say_that_there_is_no_checkpoint(two_ranks: Ranks, tmp_path: Path) -> None:
    found = two_ranks.run(fails_alike, str(tmp_path))
    assert all("there is no checkpoint at" in message for (message,) in found)
