"""Sources on another device: the grouping and the order of work, with CPU tensors on both sides.

(Between real devices: tests/gpu/test_gpu.py.)
"""

from __future__ import annotations

import functools

import pytest
import torch

from ema_fused.engine import across_devices
from ema_fused.engine.across_devices import MovedPart
from ema_fused.engine.parts import Task, Update
from ema_fused.engine.routing import split

_split = functools.partial(split, arithmetic="lerp", backend=None, names=None)


def tasks() -> list[Task]:
    """Pairs of 400, 8 and 40 bytes, an empty one, the first of them twice, and one only copied."""
    averaged = [torch.zeros(100), torch.zeros(2), torch.zeros(10), torch.zeros(0)]
    source = [torch.ones(100), torch.ones(2), torch.ones(10), torch.zeros(0)]
    averaged += [averaged[0], torch.zeros(1, dtype=torch.int64)]
    source += [source[0], torch.ones(1, dtype=torch.int64)]
    return [
        Task(i, a, s, only_copy=i == 5, average=0, number=i)
        for i, (a, s) in enumerate(zip(averaged, source, strict=True))
    ]


@pytest.mark.parametrize("group_bytes", [1, 100, 1 << 20])
def test_every_pair_is_updated_once_whatever_the_groups(
    group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(across_devices, "_GROUP_BYTES", group_bytes)
    pairs = tasks()
    part = MovedPart(pairs, "lerp", _split)
    groups = list(part._groups())
    assert sorted(task.pair for group in groups for task in group) == [0, 1, 2, 5]
    assert len(groups) == {1: 4, 100: 2, 1 << 20: 1}[group_bytes]
    assert part.average(Update([0.25], []))
    assert [task.averaged.unique().tolist() for task in pairs[:3]] == [[0.25]] * 3
    assert pairs[5].averaged == 1
    assert part.average(Update([0.0], [0.5, 0.0, 1.0, 0.0, 0.5, 0.0]))
    assert [float(task.averaged[0]) for task in pairs[:3]] == [0.625, 0.25, 1.0]


def test_each_average_has_its_weight_and_a_set_flag_stops_them_all() -> None:
    pairs = [task._replace(average=i % 2) for i, task in enumerate(tasks()[:3])]
    part = MovedPart(pairs, "lerp", _split)
    assert part.average(Update([0.5, 0.25], [], found_inf=torch.ones(1)))
    assert not any(task.averaged.any() for task in pairs)
    assert part.average(Update([0.5, 0.25], [], found_inf=torch.zeros(1)))
    assert [float(task.averaged[0]) for task in pairs] == [0.5, 0.25, 0.5]


def test_overlaps_are_refused_before_anything_is_written() -> None:
    memory = torch.zeros(10)
    averaged = [torch.zeros(3), memory[:6], memory[5:]]
    pairs = [Task(i, a, torch.ones(a.shape), False, 0, i) for i, a in enumerate(averaged)]
    MovedPart(pairs[:2], "lerp", _split)
    with pytest.raises(ValueError, match="'b' and 'c': averaged tensors overlap in memory"):
        MovedPart(pairs, "lerp", _split, ["a", "b", "c"])


def test_a_repeated_pair_is_swapped_once() -> None:
    pairs = tasks()
    part = MovedPart(pairs, "lerp", _split)
    assert part.swap()
    assert pairs[0].averaged.unique().tolist() == [1.0]
    assert pairs[0].source.unique().tolist() == [0.0]
    assert part.copy()
    assert pairs[0].averaged.unique().tolist() == [0.0]


def test_changed_tensors_are_reported_and_nothing_is_done() -> None:
    pairs = tasks()
    part = MovedPart(pairs, "lerp", _split)
    pairs[2].source.resize_(5)
    assert not part.average(Update([0.5], []))
    assert not part.swap()
    assert not part.copy()
    assert part.changed() == (2, True, "float32 of shape (10,)")
    assert pairs[0].averaged.unique().tolist() == [0.0]
