"""Sources on another device: the grouping and the order of work, with CPU tensors on both sides.

(Between real devices: tests/test_gpu.py.)
"""

from __future__ import annotations

import pytest
import torch

from ema_fused import moved
from ema_fused.moved import MovedPart


def part() -> MovedPart:
    """Pairs of 400, 8 and 40 bytes, an empty one, the first of them twice, and one only copied."""
    averaged = [torch.zeros(100), torch.zeros(2), torch.zeros(10), torch.zeros(0)]
    source = [torch.ones(100), torch.ones(2), torch.ones(10), torch.zeros(0)]
    averaged += [averaged[0], torch.zeros(1, dtype=torch.int64)]
    source += [source[0], torch.ones(1, dtype=torch.int64)]
    only_copy = [False] * 5 + [True]
    return MovedPart(averaged, source, only_copy, "lerp", range(6), None)


@pytest.mark.parametrize("group_bytes", [1, 100, 1 << 20])
def test_every_pair_is_updated_once_whatever_the_groups(
    group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved, "_GROUP_BYTES", group_bytes)
    pairs = part()
    groups = list(pairs._groups())
    assert sorted(place for group in groups for place in group) == [0, 1, 2, 5]
    assert len(groups) == {1: 4, 100: 2, 1 << 20: 1}[group_bytes]
    assert pairs.average(0.25, ())
    assert [tensor.unique().tolist() for tensor in pairs._averaged[:3]] == [[0.25]] * 3
    assert pairs._averaged[5] == 1
    assert pairs.average(0.0, [0.5, 0.0, 1.0, 0.0, 0.5, 0.0])
    assert [float(tensor[0]) for tensor in pairs._averaged[:3]] == [0.625, 0.25, 1.0]


def test_a_repeated_pair_is_swapped_once() -> None:
    pairs = part()
    assert pairs.swap()
    assert pairs._averaged[0].unique().tolist() == [1.0]
    assert pairs._source[0].unique().tolist() == [0.0]
    assert pairs.copy()
    assert pairs._averaged[0].unique().tolist() == [0.0]


def test_changed_tensors_are_reported_and_nothing_is_done() -> None:
    pairs = part()
    pairs._source[2].resize_(5)
    assert not pairs.average(0.5, ())
    assert not pairs.swap()
    assert not pairs.copy()
    changed = pairs.changed()
    assert changed is not None
    assert changed == (2, True, "float32 of shape (10,)")
    assert pairs._averaged[0].unique().tolist() == [0.0]
