"""Which backends a test runs over, and when a GPU test is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from ema_fused.engine import backends
from tests import ranks
from tests.ranks import Ranks

# The same examples in every run, and as much time for each as a busy machine takes.
settings.register_profile(
    "ema_fused",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ema_fused")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", "foreach"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that serves CPU tensors."""
    name: str = request.param
    reason = backends.why_not(name)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that tests start: sums are split among threads, and rounded accordingly.

    Small networks are quicker so, too: their threads only wait for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with ranks.started(2) as processes:
        yield processes


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    with ranks.started(4) as processes:
        yield processes
