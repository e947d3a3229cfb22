"""On a GPU: averages of the pieces of a model that DeepSpeed's ZeRO-3 partitions; ZeRO-1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import device, ranks
from tests.ranks import Ranks

# Both skip where DeepSpeed is missing.
zero3: Any = pytest.importorskip("tests.frameworks.test_zero3")
engines: Any = pytest.importorskip("tests.frameworks.test_zero3_engines")

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """One if a test asks for no other number, each with a GPU of its own."""
    count = getattr(request, "param", 1)
    device.needs_devices(count)
    with ranks.started(count, kind=device.DEVICE) as started:
        yield started


@pytest.mark.parametrize(
    ("processes", "options"),
    [(1, {}), (1, {"offload_optimizer": engines.HOST}), (2, {})],
    indirect=["processes"],
    ids=str,
)
def test_averages_are_those_of_the_recorded_pieces(
    processes: Ranks, options: dict[str, Any]
) -> None:
    processes.run(engines.averages, options)


def test_each_kind_of_average_is_that_of_the_recorded_pieces(processes: Ranks) -> None:
    for found in processes.run(zero3.averages, True):
        assert found == {name: [] for name in zero3.OPTIONS}


@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=str)
def test_averages_swapped_in_are_what_is_gathered(
    processes: Ranks, options: dict[str, Any]
) -> None:
    processes.run(zero3.swaps, True, options)


def test_training_goes_on_from_averages_copied_in(processes: Ranks) -> None:
    processes.run(zero3.copies, True)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_average_gathered_masters_and_go_on_from_copies(
    processes: Ranks, stage: int
) -> None:
    processes.run(engines.of_gathered_masters, stage)
    processes.run(engines.gone_on_from_averages, stage, True, True)
