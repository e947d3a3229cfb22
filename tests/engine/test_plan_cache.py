"""Stateless calls find their plan again by what the tensors are, and never a wrong one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ema_fused
from ema_fused.engine import backends, ops
from ema_fused.engine.plan_cache import PlanCache
from tests.device import DEVICE

pytestmark = pytest.mark.skipif(
    backends.pinned(None) == "foreach" or backends.native() is None,
    reason="plans are kept where native kernels run",
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> PlanCache:
    fresh = PlanCache()
    monkeypatch.setattr(ops, "_plans", fresh)
    return fresh


@pytest.fixture
def plans_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One item for each plan that is made."""
    made: list[int] = []
    original = ops.Plan

    def counted(averaged: Any, source: Any, **options: Any) -> ema_fused.Plan:
        made.append(len(averaged))
        return original(averaged, source, **options)

    monkeypatch.setattr(ops, "Plan", counted)
    yield made


def lists(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (0,), (7,), (2, 3, 4)]

    def values() -> list[Tensor]:
        return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]

    return values(), values()


def check(averaged: list[Tensor], source: list[Tensor], weight: float = 0.3) -> None:
    """A stateless update is what torch computes."""
    expected = [torch.lerp(a, s.to(a.dtype), weight) for a, s in zip(averaged, source, strict=True)]
    ema_fused.lerp_(averaged, source, weight)
    for found, wanted in zip(averaged, expected, strict=True):
        assert torch.equal(found, wanted)


def test_the_same_tensors_in_fresh_lists_need_no_new_plan(plans_made: list[int]) -> None:
    averaged, source = lists()
    for _ in range(5):
        check(list(averaged), list(source))
    # Other objects over the same memory too, as `parameter.data` gives at each call.
    check([a.detach() for a in averaged], [s.view_as(s) for s in source])
    check(tuple(averaged), tuple(source))  # type: ignore[arg-type]
    assert len(plans_made) == 1


def test_copies_swaps_and_averages_share_a_plan(plans_made: list[int]) -> None:
    averaged, source = lists()
    check(averaged, source)
    ema_fused.lerp_(averaged, source, [0.1, 0.2, 0.3, 0.4, 0.5])
    before = [a.clone() for a in averaged], [s.clone() for s in source]
    ema_fused.swap_(averaged, source)
    assert all(torch.equal(a, b) for a, b in zip(averaged, before[1], strict=True))
    assert all(torch.equal(s, b) for s, b in zip(source, before[0], strict=True))
    ema_fused.copy_(averaged, source)
    assert all(torch.equal(a, s) for a, s in zip(averaged, source, strict=True))
    assert len(plans_made) == 1


def changed_storage(tensors: list[Tensor]) -> None:
    tensors[0].data = tensors[0].data.clone()


def other_strides(tensors: list[Tensor]) -> None:
    tensors[0] = tensors[0].as_strided((3, 5), (1, 3))


def other_shape(tensors: list[Tensor]) -> None:
    tensors[4] = tensors[4].view(4, 6)[:2, :6].view(12)[:0]


def other_order(tensors: list[Tensor]) -> None:
    tensors[0], tensors[3] = tensors[3], tensors[0]


@pytest.mark.parametrize("change", [changed_storage, other_strides])
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_other_tensors_in_one_place_are_seen(change: Any) -> None:
    averaged, source = lists()
    for _ in range(2):
        check(averaged, source)
    change(source)
    check(averaged, source)
    check(averaged, source)


@pytest.mark.parametrize("change", [other_shape, other_order])
def test_what_no_longer_pairs_up_is_refused(change: Any) -> None:
    averaged, source = lists()
    check(averaged, source)
    change(source)
    before = [a.clone() for a in averaged]
    with pytest.raises(ValueError, match=r"pair [04]"):
        ema_fused.lerp_(averaged, source, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(averaged, before, strict=True))


@pytest.mark.parametrize(
    ("shape", "other"),
    [((4,), (4, 1)), ((4,), (1, 4)), ((4,), (2, 2)), ((1,), ()), ((), (1,)), ((1, 1), (1,))],
)
@pytest.mark.parametrize("function", [ema_fused.copy_, ema_fused.swap_])
def test_another_shape_over_the_same_memory_is_refused(
    shape: tuple[int, ...], other: tuple[int, ...], function: Any
) -> None:
    averaged, source = [torch.zeros(shape)], [torch.ones(shape)]
    function(averaged, source)
    for reshaped in (source[0].view(other), _reshaped_in_place(source[0], other)):
        before = averaged[0].clone()
        with pytest.raises(ValueError, match="pair 0"):
            function(averaged, [reshaped])
        with pytest.raises(ValueError, match="pair 0"):
            ema_fused.lerp_(averaged, [reshaped], 0.5)
        assert torch.equal(averaged[0], before)


def _reshaped_in_place(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    tensor.data = tensor.view(shape)
    return tensor


def test_another_dtype_over_the_same_memory_is_seen() -> None:
    averaged, source = [torch.zeros(8)], [torch.arange(8.0).half()]
    check(averaged, source)
    check(averaged, [source[0].view(torch.bfloat16)])


def test_a_pending_negation_over_the_same_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    averaged, source = [torch.zeros(8)], [torch.arange(8.0)]
    ema_fused.copy_(averaged, source)
    negated = torch._neg_view(source[0])
    assert negated.data_ptr() == source[0].data_ptr()
    with pytest.warns(ema_fused.SlowPathWarning, match="negation"):
        ema_fused.copy_(averaged, [negated])
    assert torch.equal(averaged[0], -torch.arange(8.0))


def test_memory_that_was_freed_and_taken_again_is_no_stale_address() -> None:
    """torch hands the same address to the next tensor of a size: with other contents, and alive."""
    source = [torch.full((1000,), 2.0)]
    addresses = set()
    for step in range(20):
        averaged = [torch.full((1000,), float(step))]
        addresses.add(averaged[0].data_ptr())
        check(averaged, source, 0.25)
        del averaged
    assert len(addresses) < 20, "the test needs an address that comes again"


def test_no_tensor_is_kept_alive(cache: PlanCache) -> None:
    averaged, source = lists()
    check(averaged, source)
    assert len(cache) == 1
    alive = [weakref.ref(tensor) for tensor in [*averaged, *source]]
    storage = weakref.ref(averaged[0].untyped_storage())
    del averaged, source
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []
    assert storage() is None


def test_the_cache_is_bounded_and_keeps_the_latest(cache: PlanCache, plans_made: list[int]) -> None:
    groups = [lists(seed) for seed in range(20)]
    for averaged, source in groups:
        check(averaged, source)
    assert len(cache) == 16
    assert len(plans_made) == 20
    for averaged, source in groups[-16:]:
        check(averaged, source)
    assert len(plans_made) == 20
    check(*groups[0])
    assert len(plans_made) == 21
    check(*groups[-16 + 1])  # the first of the 16 was the latest least used, and is gone
    assert len(plans_made) == 21


def test_the_backend_that_is_pinned_is_part_of_what_a_plan_is(
    monkeypatch: pytest.MonkeyPatch, plans_made: list[int]
) -> None:
    averaged, source = lists()
    check(averaged, source)
    monkeypatch.setenv("EMA_FUSED_BACKEND", "foreach")
    check(averaged, source)
    monkeypatch.delenv("EMA_FUSED_BACKEND")
    check(averaged, source)
    assert len(plans_made) == 2


def test_what_has_no_kernel_is_not_kept(cache: PlanCache) -> None:
    averaged, source = [torch.zeros(4, 4)[:, :2]], [torch.ones(4, 2)]
    with pytest.warns(ema_fused.SlowPathWarning, match="not dense"):
        ema_fused.lerp_(averaged, source, 0.5)
    assert len(cache) == 0


def test_errors_are_those_of_a_plan_each_time() -> None:
    averaged, source = [torch.zeros(2, dtype=torch.int64)], [torch.ones(2, dtype=torch.int64)]
    ema_fused.copy_(averaged, source)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"pair 0: torch.int64 .* have no average"):
            ema_fused.lerp_(averaged, source, 0.5)
    mixed = [torch.zeros(2)], [torch.ones(2, dtype=torch.float64)]
    ema_fused.lerp_(*mixed, 0.5)
    for _ in range(2):
        with pytest.raises(TypeError, match="can't be swapped"):
            ema_fused.swap_(*mixed)
    with pytest.raises(ValueError, match="2 weights for 1 pairs"):
        ema_fused.lerp_(*mixed, [0.5, 0.5])
    shared = torch.ones(2)
    twice = [torch.zeros(2), torch.zeros(2)], [shared, shared]
    ema_fused.lerp_(*twice, 0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"pair \d and pair \d: source tensors overlap"):
            ema_fused.swap_(*twice)


def test_threads_can_share_it() -> None:
    groups = [lists(seed) for seed in range(4)]
    expected = []
    for averaged, source in groups:
        now = [a.clone() for a in averaged]
        for _ in range(200):
            now = [torch.lerp(a, s, 0.01) for a, s in zip(now, source, strict=True)]
        expected.append(now)

    def work(averaged: list[Tensor], source: list[Tensor]) -> None:
        for _ in range(200):
            ema_fused.lerp_(averaged, source, 0.01)

    threads = [threading.Thread(target=work, args=group) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (averaged, _), wanted in zip(groups, expected, strict=True):
        assert all(torch.equal(a, w) for a, w in zip(averaged, wanted, strict=True))


@pytest.mark.gpu
def test_several_devices_are_found_again(plans_made: list[int]) -> None:
    averaged, source = lists()
    averaged += [tensor.to(DEVICE, copy=True) for tensor in averaged]
    source += [tensor.to(DEVICE, copy=True) for tensor in source]
    for _ in range(3):
        check(averaged, source)
    assert len(plans_made) == 1
