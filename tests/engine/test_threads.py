"""When an update takes threads, counted in processes that had none before."""

from __future__ import annotations

import pytest

from ema_fused.engine import backends
from tests import processes

pytestmark = pytest.mark.skipif(backends.native() is None, reason="no compiled extension")


def threads_started(tensors: int, elements: int) -> int:
    return int(processes.run("-m", "tests.engine.threads_run", tensors, elements).stdout)


@pytest.mark.parametrize(
    ("tensors", "elements"),
    [(1, 16), (5_000, 16), (1_000, 1_000), (1, 1_000_000)],
    ids=["one", "many to check", "a million in small ones", "a million in one"],
)
@pytest.mark.slow
def test_checking_tensors_and_small_updates_start_no_thread(tensors: int, elements: int) -> None:
    assert threads_started(tensors, elements) == 0


def test_a_large_update_takes_all_threads() -> None:
    assert threads_started(10, 1_000_000) == 3
