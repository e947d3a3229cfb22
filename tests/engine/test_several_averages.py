"""Several averages of one source in one pass: each as if it were alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_fused import Plan
from ema_fused.engine import backends
from ema_fused.engine.pairs import MAX_AVERAGES

SIZES = [0, 1, 7, 129, 8191, 8193, 20_000]


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in SIZES]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 3, MAX_AVERAGES])
def test_each_average_is_what_it_would_be_alone(
    count: int, source_dtype: torch.dtype, rounding: str, backend: str
) -> None:
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float32]
    averaged = [tensors(dtypes[k % len(dtypes)], k) for k in range(count)]
    expected = [[tensor.clone() for tensor in one] for one in averaged]
    source = tensors(source_dtype, 99)
    weights = [0.1 * (k + 1) for k in range(count)]
    plan = Plan(averaged, source, rounding=rounding, backend=backend)
    for _ in range(2):
        plan.lerp_(weights)
    for k, one in enumerate(expected):
        # As a pair of the whole it has another number than alone, and so other random bits.
        halves = one[0].dtype == torch.bfloat16 and rounding == "stochastic"
        alone = Plan(one, source, backend=backend)
        for _ in range(2):
            alone.lerp_(weights[k])
        for found, wanted in zip(averaged[k], one, strict=True):
            if halves:
                torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
            else:
                assert torch.equal(found, wanted)
    assert plan.averages == count
    assert plan.tensors == count * len(SIZES)
    assert plan.elements == count * sum(SIZES)
    if backend == "cpu":
        assert plan.launches == 1


def test_one_weight_serves_all_and_copies_go_to_all(backend: str) -> None:
    averaged = [[torch.zeros(5)], [torch.ones(5)]]
    source = [torch.full((5,), 4.0)]
    plan = Plan(averaged, source, backend=backend)
    plan.lerp_(0.5)
    assert [one[0][0].item() for one in averaged] == [2.0, 2.5]
    plan.lerp_([torch.tensor(0.5), 0.0])
    assert [one[0][0].item() for one in averaged] == [3.0, 2.5]
    plan.copy_()
    assert [one[0][0].item() for one in averaged] == [4.0, 4.0]


def test_copied_pairs_are_copied_in_each(backend: str) -> None:
    averaged = [[torch.zeros(5), torch.tensor(1)] for _ in range(3)]
    source = [torch.ones(5), torch.tensor(7)]
    Plan(averaged, source, only_copy=[False, True], backend=backend).lerp_([0.1, 0.2, 0.3])
    assert [one[1].item() for one in averaged] == [7, 7, 7]
    assert [one[0][0].item() for one in averaged] == pytest.approx([0.1, 0.2, 0.3])


def test_a_list_of_one_list_is_one_average(backend: str) -> None:
    averaged = [torch.zeros(3), torch.zeros(4)]
    plan = Plan([averaged], [torch.ones(3), torch.ones(4)], backend=backend)
    plan.lerp_([0.5, 0.25])  # one a pair, as ever
    assert (averaged[0][0].item(), averaged[1][0].item()) == (0.5, 0.25)


def test_moved_sources_are_followed_by_every_average(backend: str) -> None:
    averaged = [[torch.zeros(9000)], [torch.zeros(9000)]]
    source = torch.ones(9000)
    plan = Plan(averaged, [source], backend=backend)
    plan.lerp_([0.5, 0.25])
    source.data = torch.full((9000,), 3.0)
    averaged[1][0].data = torch.full((9000,), 1.0)
    plan.lerp_([0.5, 0.25])
    assert averaged[0][0].unique().tolist() == [1.75]
    assert averaged[1][0].unique().tolist() == [1.5]


def test_copies_of_a_plan_have_several_averages_too(backend: str) -> None:
    averaged = [[torch.zeros(3)], [torch.zeros(3)]]
    plan = Plan(averaged, [torch.ones(3)], names=["w"], backend=backend)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        other.lerp_([0.5, 0.25])
        assert [tensor[0].item() for tensor in other.averaged] == [0.5, 0.25]
        assert other.averages == 2
    assert not averaged[0][0].any()


def test_what_does_not_fit_is_refused(backend: str) -> None:
    a, b, source = [torch.zeros(3)], [torch.zeros(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"3 weights for 2 averages; one each is expected"):
        Plan([a, b], source, backend=backend).lerp_([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"can't be swapped with 2 averages at once"):
        Plan([a, b], source, backend=backend).swap_()
    with pytest.raises(ValueError, match=r"9 averages of one source; at most 8"):
        Plan([[torch.zeros(3)] for _ in range(9)], source, backend=backend)
    with pytest.raises(ValueError, match=r"averaged has 2 tensors and source has 1"):
        Plan([a, [*b, torch.zeros(3)]], source, backend=backend)
    with pytest.raises(TypeError, match=r"its item 1 is a Tensor"):
        Plan([a, b[0]], source, backend=backend)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"'w of average 1'.*shape"):
        Plan([a, [torch.zeros(4)]], source, names=["w"], backend=backend)
    counts = [[torch.tensor(1)], [torch.tensor(2)]]
    with pytest.raises(TypeError, match=r"'pair 0 of average 0'.*no average"):
        Plan(counts, [torch.tensor(3)], backend=backend).lerp_(0.5)
    assert not a[0].any()


@pytest.mark.parametrize(
    ("averaged", "source", "message"),
    [
        (iter([]), [], r"averaged is a list_iterator; a list of tensors is expected: list"),
        ({"w": 1}, [], r"averaged is a dict; .*: list\(averaged.values\(\)\)"),
        ([], (x for x in ()), r"source is a generator; .*: list\(source\)"),
        ([], None, r"source is a NoneType; a list of tensors is expected"),
        ("w", [], r"averaged is a str; a list of tensors is expected"),
        (torch.zeros(2), [], r"averaged is one tensor; .*: \[averaged\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lists_are_asked_for(averaged: Any, source: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Plan(averaged, source)
    with pytest.raises(TypeError, match=r"only_copy is True; a list of one item a pair"):
        Plan([torch.zeros(1)], [torch.zeros(1)], only_copy=True)  # type: ignore[arg-type]


def test_one_memory_can_not_be_two_averages() -> None:
    if backends.native() is None:
        pytest.skip("overlaps are looked for by the extension")
    a, source = [torch.zeros(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"'w of average 0' and 'w of average 1'.*overlap"):
        Plan([a, a], source, names=["w"])


def test_the_extension_takes_as_many_averages() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the extension is not built")
    assert native.MAX_AVERAGES == MAX_AVERAGES
