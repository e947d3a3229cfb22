"""Trainings under Lightning's strategies that shard the model, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.frameworks.callbacks import lightning_killed_run as killed
from tests.frameworks.callbacks import lightning_sharded_run as run
from tests.frameworks.callbacks.lightning_cases import QUIET
from tests.frameworks.callbacks.lightning_sharded_cases import (
    RESUMED,
    averages,
    found,
    until,
)
from tests.networks import differences
from tests.ranks import Ranks

pytestmark = [QUIET, pytest.mark.slow]

LAST = 3 * run.BATCHES
IMPORTED = (*run.IMPORTED, killed.__name__)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks.started(2, IMPORTED) as processes:
        yield processes


@pytest.fixture(scope="module")
def uninterrupted(
    two: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """What a training of three epochs has left, made when first asked for."""
    seen: dict[str, dict[str, Any]] = {}

    def training_of(way: str) -> dict[str, Any]:
        if way not in seen:
            folder = tmp_path_factory.mktemp(way)
            two.run(killed.fit_warmed_up, folder, way)
            seen[way] = found(folder)
        return seen[way]

    return training_of


def die(function: Callable[..., None], *arguments: Any) -> None:
    """Runs it in two processes, of which one at least is killed."""
    with (
        ranks.started(2, IMPORTED) as doomed,
        pytest.raises(AssertionError, match="a process ended"),
    ):
        doomed.run(function, *arguments)


# What the killed process had done: its steps, the averages', and averages of tensors in the last.
MOMENTS = {"backward": (6, 6, 0), "between": (7, 6, 0), "update": (7, 6, 3)}


@pytest.mark.parametrize(
    ("way", "moment"),
    [
        ("fsdp1", "backward"),
        ("fsdp1", "between"),
        ("fsdp1", "update"),
        ("fsdp2", "backward"),
        ("fsdp2", "between"),
        ("fsdp2", "update"),
        ("tensor_parallel", "backward"),
    ],
)
def test_killed_in_the_middle_of_a_step_it_resumes_to_the_bit(
    two: Ranks,
    uninterrupted: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    way: str,
    moment: str,
) -> None:
    die(killed.die_in_a_step, tmp_path, way, moment)
    died = json.loads((tmp_path / killed.DIED).read_text())
    assert (died["steps"], died["averaged"], died["calls"]) == MOMENTS[moment]
    [checkpoint] = tmp_path.glob("*.ckpt")
    assert checkpoint.name == f"step={run.BATCHES}.ckpt"
    two.run(killed.fit_warmed_up, tmp_path / "resumed", way, checkpoint)
    whole, resumed = uninterrupted(way), found(tmp_path / "resumed")
    own, start = whole["own"], resumed["at_start"]
    assert start["n_averaged"] == run.BATCHES
    expected = averages(until(own, run.BATCHES), function=run.warmed_up)
    assert differences(start["averages"], expected) == []
    assert sorted(resumed["own"]) == list(range(run.BATCHES + 1, LAST + 1))
    assert all(differences(state, own[step]) == [] for step, state in resumed["own"].items())
    assert resumed["n_averaged"] == LAST
    assert differences(resumed["end"], whole["end"]) == []
    assert differences(resumed["end"], averages(own, function=run.warmed_up)) == []


def killed_in_a_save(folder: Path, way: str, name: str, time: int) -> Path:
    die(killed.die_in_a_save, folder, way, name, time)
    assert (folder / name / "current_model_state").is_dir()
    return folder / name


@pytest.mark.parametrize("way", ["fsdp1", "fsdp2"])
def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(
    two: Ranks, uninterrupted: Callable[[str], dict[str, Any]], tmp_path: Path, way: str
) -> None:
    torn = killed_in_a_save(tmp_path, way, f"step={RESUMED}.ckpt", 1)
    with pytest.raises(AssertionError, match="does not point to a valid checkpoint"):
        two.run(run.fit, tmp_path / "torn", way, torn)
    two.run(run.fit, tmp_path / "resumed", way, tmp_path / f"step={run.BATCHES}.ckpt")
    expected = averages(uninterrupted(way)["own"])
    assert differences(found(tmp_path / "resumed")["end"], expected) == []


def test_a_checkpoint_half_overwritten_passes_for_none(two: Ranks, tmp_path: Path) -> None:
    torn = killed_in_a_save(tmp_path, "fsdp2", "on_train_batch_start.ckpt", 2)
    with pytest.raises(AssertionError, match="does not point to a valid checkpoint"):
        two.run(run.fit, tmp_path / "torn", "fsdp2", torn)
