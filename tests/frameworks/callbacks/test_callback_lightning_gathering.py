"""Our callback of shards beside Lightning's pull request 21414, which gathers the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ranks
from tests.frameworks.callbacks import lightning_gathering_run as run
from tests.frameworks.callbacks.lightning_cases import QUIET
from tests.frameworks.callbacks.lightning_sharded_run import BATCHES, IMPORTED, Perceptron
from tests.networks import differences
from tests.ranks import Ranks

pytestmark = [QUIET, pytest.mark.slow]

MODEL = run.size_of(Perceptron().parameters())
UPDATES = 2 * BATCHES
UNITS = 3  # that FSDP gathers: each layer, and what is left


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks.started(2, (*IMPORTED, run.__name__)) as processes:
        yield processes


def test_both_make_the_same_averages_and_only_one_gathers(two: Ranks, tmp_path: Path) -> None:
    theirs = two.run(run.trained, tmp_path / "theirs", "fsdp1", "gathering")
    ours = two.run(run.trained, tmp_path / "ours", "fsdp1", "sharded")
    for gathering, sharded in zip(theirs, ours, strict=True):
        assert gathering["updates"] == sharded["updates"] == UPDATES
        buffers = {"seen"}  # torch averages whole numbers too, and cuts them off
        assert set(differences(gathering["averages"], sharded["averages"])) <= buffers
        assert gathering["loss"] == sharded["loss"]
        # Theirs: the whole model arrives in each process at each update, and stays as the average.
        assert gathering["sent"] == UNITS * UPDATES
        assert gathering["kept"] == gathering["held"] == MODEL
        # Ours: nothing arrives.
        assert sharded["sent"] == sharded["received"] == 0
        assert sharded["kept"] == sharded["held"] < 0.6 * MODEL
    assert sum(one["kept"] for one in ours) == MODEL
    # All pieces that the others have, and what evens them out.
    assert sum(one["received"] for one in theirs) >= MODEL * UPDATES


@pytest.mark.parametrize(
    ("folders", "error"),
    [(False, "KeyError: 'state_dict'"), (True, "UnpicklingError: ")],
)
def test_what_gathers_is_not_resumed(two: Ranks, tmp_path: Path, folders: bool, error: str) -> None:
    for found in two.run(run.resumed, tmp_path, folders):
        assert found.startswith(error)


def test_what_gathers_does_not_begin_under_fsdp2(two: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
        two.run(run.trained, tmp_path, "fsdp2", "gathering")
