"""The processes that other tests run in: what a failure in one of them leaves behind."""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist

from tests import ranks

pytestmark = pytest.mark.slow


def left_alone() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this one fails first")
    dist.barrier()


def summed() -> float:
    found = torch.ones(1)
    dist.all_reduce(found)
    return found.item()


def test_a_failure_says_where_the_others_wait_and_leaves_them_to_no_later_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "_GRACE", 0.5)
    with ranks.started(2) as two:
        with pytest.raises(AssertionError) as found:
            two.run(left_alone)
        assert two.run(summed) == [2.0, 2.0]
    expected = r"process 1: .*this one fails first.*process 0 didn't answer.*in left_alone"
    assert re.match(expected, str(found.value), re.DOTALL)


def test_a_process_that_has_ended_fails_one_test() -> None:
    with ranks.started(2) as two:
        os.kill(two.run(os.getpid)[1], signal.SIGKILL)
        with pytest.raises(AssertionError, match="a process ended"):
            two.run(summed)
        assert two.run(summed) == [2.0, 2.0]
