"""Which backends a test runs over, and when a GPU test is skipped."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from ema_fused.engine import backends
from tests import ranks
from tests.ranks import Ranks

HERE = Path(__file__).parent
_NO_GPU = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")

# The same examples in every run, and as much time for each as a busy machine takes.
settings.register_profile(
    "ema_fused",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ema_fused")


# The processes that run tests side by side share the cores. Tests of threads set their own number.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _WORKERS))

# Files that take longest are begun first, so that no process is left alone with one at the end.
_LONGEST = (
    "project/test_build.py",
    "documentation/test_docs.py",
    "bench/test_benchmarks.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"two_ranks", "four_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("ranks"))
        # A file's tests share fixtures, so one process runs them; a group is several such files.
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(HERE).as_posix()))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(_NO_GPU)
    items.sort(key=lambda item: not item.path.as_posix().endswith(_LONGEST))


def pytest_collection_finish() -> None:
    """Sets aside what was imported and collected: collecting garbage in tests then takes no time.

    A full collection walks hundreds of thousands of objects otherwise.
    """
    gc.collect()
    gc.freeze()


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
