"""A program that is killed while it saves never leaves a checkpoint that loads and is wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict

from ema_fused import AveragedWeights
from ema_fused.saving import checkpoints
from tests import processes, ranks
from tests.saving import killed_saves_run
from tests.saving.killed_saves_run import (
    Death,
    Kill,
    flat,
    load_average,
    save_average,
    train_and_save,
)
from tests.sharded_models import perceptron, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

STEPS = 5

NAMES = {
    "first.weight": (13, 7),
    "first.bias": (13,),
    "norm.weight": (13,),
    "norm.bias": (13,),
    "norm.running_mean": (13,),
    "norm.running_var": (13,),
    "norm.num_batches_tracked": (),
    "last.weight": (3, 13),
    "last.bias": (3,),
    "scale": (1,),
}


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names whose values aren't the same to the bit."""

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return bool(a == b)
        return a.dtype == b.dtype and torch.equal(a, b)

    return [
        name
        for name in {**one, **other}
        if name not in one or name not in other or not same(one[name], other[name])
    ]


# One process, killed at each of its actions on files.


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Kill], list[Kill]]:
    folder = tmp_path_factory.mktemp("swept")
    done = processes.run(killed_saves_run.__file__, folder)
    anew, in_a_row = json.loads(done.stdout)
    return [Kill(*kill) for kill in anew], [Kill(*kill) for kill in in_a_row]


def test_killed_at_any_moment_a_save_leaves_the_old_or_the_new(
    swept: tuple[list[Kill], list[Kill]],
) -> None:
    anew, _ = swept
    found = [kill.after for kill in anew]
    assert found == sorted(found)
    assert {kill.after for kill in anew} == {1.0, 2.0}
    assert anew[-1].done and not any(kill.done for kill in anew[:-1])
    # It was killed at every stage.
    stages = {tuple(kill.files): kill.after for kill in anew}
    assert stages == {
        ("checkpoint", "checkpoint.partial"): 1.0,
        ("checkpoint.partial", "checkpoint.previous"): 1.0,
        ("checkpoint", "checkpoint.previous"): 2.0,
        ("checkpoint",): 2.0,
    }


def test_killed_again_and_again_saves_leave_the_old_or_the_new(
    swept: tuple[list[Kill], list[Kill]],
) -> None:
    _, in_a_row = swept
    for kill in in_a_row:
        assert kill.after in ((kill.wrote,) if kill.done else (kill.before, kill.wrote)), kill
    assert sum(kill.after == kill.before for kill in in_a_row) > 10
    assert sum(kill.after == kill.wrote for kill in in_a_row) > 10
    assert in_a_row[-1].done and in_a_row[-1].files == ["checkpoint"]


# Two processes, one of which is killed.


@pytest.fixture(scope="module")
def uninterrupted(
    two_ranks: ranks.Ranks, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The whole states after each step."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    first, second = two_ranks.run(train_and_save, folder, STEPS)
    assert not any(different(*pair) for pair in zip(first, second, strict=True))
    assert all(different(*pair) for pair in itertools.pairwise(first))
    return first


def loaded_here(path: Path) -> dict[str, Any]:
    """In a process that has no others around it, into a plain model."""
    model = perceptron(seed=3)
    optimizer = trainer(model)
    averaged = AveragedWeights(model, 0.1, averaged_dtype=torch.float64)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {
        "model": model_state,
        "optimizer": optimizer_state,
        "averaged": averaged.state_dict(),
    }
    checkpoints.load(state, path)
    averaged.load_state_dict(state["averaged"])
    return flat(state | {"averaged": averaged.state_dict()})


@pytest.mark.parametrize(
    ("death", "left_step"),
    [
        (Death(rank=1, step=3, event="open", count=1), 2),  # its file is never written
        (Death(rank=0, step=3, event="os.rename", count=3), 2),  # between the last two renames
        (Death(rank=0, step=3, event="shutil.rmtree", count=3), 3),  # when all has its name
    ],
)
def test_a_rank_killed_while_it_saves_leaves_one_step_and_training_goes_on_from_it(
    death: Death,
    left_step: int,
    two_ranks: ranks.Ranks,
    uninterrupted: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    with (
        ranks.started(2) as killed,
        pytest.raises(AssertionError, match="a process ended"),
    ):
        killed.run(train_and_save, tmp_path, STEPS, death)
    left = loaded_here(tmp_path / "checkpoint")
    assert not different(left, uninterrupted[left_step - 1])
    assert int(left["/averaged/steps"]) == left_step
    for resumed in two_ranks.run(train_and_save, tmp_path, STEPS, None, True):
        assert len(resumed) == STEPS - left_step
        for states in zip(resumed, uninterrupted[left_step:], strict=True):
            assert not different(*states)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
    assert not different(loaded_here(tmp_path / "checkpoint"), uninterrupted[-1])


# Saved by some, loaded by others.


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in found.items()}


def average_here(path: Path) -> dict[str, Tensor]:
    averaged = AveragedWeights(perceptron(seed=4), 0.25, averaged_dtype=torch.float64)
    state = averaged.state_dict()
    checkpoints.load(state, path)
    averaged.load_state_dict(state)
    assert int(averaged.steps) == 2
    return averaged.weights


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """The same average of a plain model."""
    return killed_saves_run.filled(perceptron(seed=1)).weights


def test_an_average_saved_by_two_is_loaded_by_one_and_by_three(
    two_ranks: ranks.Ranks,
    four_ranks: ranks.Ranks,
    expected: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    for saved in two_ranks.run(save_average, tmp_path / "by-two", [0, 1]):
        assert not different(saved, expected)
    assert shapes_in(tmp_path / "by-two") == {
        "steps": (),
        **{f"module.{name}": shape for name, shape in NAMES.items()},
    }
    assert not different(average_here(tmp_path / "by-two"), expected)
    *three, rest = four_ranks.run(load_average, tmp_path / "by-two", [0, 1, 2])
    assert rest == {}
    for loaded in three:
        assert not different(loaded, expected)


def test_an_average_saved_by_four_is_loaded_by_two(
    two_ranks: ranks.Ranks,
    four_ranks: ranks.Ranks,
    expected: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    for saved in four_ranks.run(save_average, tmp_path / "by-four", [0, 1, 2, 3]):
        assert not different(saved, expected)
    assert shapes_in(tmp_path / "by-four")["module.scale"] == (1,)  # three hold none of it
    for loaded in two_ranks.run(load_average, tmp_path / "by-four", [0, 1]):
        assert not different(loaded, expected)


def test_some_of_the_processes_save_without_the_others(
    four_ranks: ranks.Ranks, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    first, *three = four_ranks.run(save_average, tmp_path / "by-three", [1, 2, 3])
    assert first == {}
    for saved in three:
        assert not different(saved, expected)
    assert not different(average_here(tmp_path / "by-three"), expected)


def test_a_whole_average_fits_a_plain_model(
    two_ranks: ranks.Ranks, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    whole, _ = two_ranks.run(save_average, tmp_path / "checkpoint", [0, 1])
    model = perceptron(seed=5).double()
    model.load_state_dict(whole)
    assert not different(dict(model.state_dict()), expected)
