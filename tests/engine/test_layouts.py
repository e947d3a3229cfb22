"""Layouts, sizes and memory: what is flat, what falls back, what overlaps."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import ema_fused
from ema_fused import Plan
from ema_fused.engine import backends

MAKE = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "size-1 strides": lambda t: t.contiguous().as_strided(t.shape, (7, *t.stride()[1:])),
}
SHAPES = {"size-1 strides": (1, 3, 4, 5)}


def pair(layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shape = SHAPES.get(layout, (6, 3, 4, 5))
    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    return MAKE[layout](sides[0]), MAKE[layout](sides[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", MAKE)
def test_dense_layouts_have_a_kernel_and_torchs_result(
    backend: str, layout: str, dtype: torch.dtype
) -> None:
    averaged, source = pair(layout, dtype)
    strides = averaged.stride()
    expected = torch.lerp(averaged, source, 0.3)
    plan = Plan([averaged], [source], backend=backend)
    plan.lerp_(0.3)
    assert plan.backends == (backend,)
    assert torch.equal(averaged, expected)
    assert averaged.stride() == strides
    plan.copy_()
    assert torch.equal(averaged, source)


def strided() -> tuple[Tensor, Tensor]:
    return torch.arange(20.0)[::2], torch.ones(10)


def unlike() -> tuple[Tensor, Tensor]:
    return torch.arange(6.0).view(2, 3), torch.ones(3, 2).t()


def expanded_source() -> tuple[Tensor, Tensor]:
    return torch.arange(6.0).view(2, 3), torch.ones(1, 3).expand(2, 3)


def negated() -> tuple[Tensor, Tensor]:
    return torch.zeros(3), torch.complex(torch.zeros(3), torch.ones(3)).conj().imag


def complex_numbers() -> tuple[Tensor, Tensor]:
    return torch.zeros(3) * 1j, (torch.ones(3) * 1j).conj()


REASONS = {
    strided: "the averaged tensor is not dense",
    unlike: "the source's strides are not the averaged tensor's",
    expanded_source: "the source's strides are not the averaged tensor's",
    negated: "the source has its negation pending",
    complex_numbers: "the source has its conjugation pending",
}


@pytest.mark.parametrize("make", REASONS, ids=lambda make: make.__name__)
def test_what_has_no_kernel_falls_back_with_one_warning(
    make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backends.native() is None:
        pytest.skip("the extension is not built")
    assert callable(make)
    monkeypatch.setattr(backends, "_warned", set())
    averaged, source = make()
    expected = torch.lerp(averaged.clone(), source.clone(), 0.25)
    with pytest.warns(ema_fused.SlowPathWarning, match=REASONS[make]):
        plan = Plan([averaged], [source])
    plan.lerp_(0.25)
    assert plan.backends == ("foreach",)
    assert torch.equal(averaged, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plan([averaged], [source])


def test_empty_tensors_and_lists_do_nothing(backend: str) -> None:
    for tensors in ([], [torch.empty(0), torch.empty(3, 0)]):
        plan = Plan(tensors, [tensor.clone() for tensor in tensors], backend=backend)
        plan.lerp_(0.5)
        plan.copy_()
        plan.swap_()
        assert (plan.elements, plan.chunks, plan.launches) == (0, 0, 0)
    averaged = [torch.empty(0), torch.zeros(2), torch.empty(0)]
    source = [torch.empty(0), torch.ones(2), torch.empty(0)]
    Plan(averaged, source, backend=backend).lerp_([0.1, 0.5, 0.9])
    assert averaged[1].tolist() == [0.5, 0.5]


def test_tied_tensors_are_updated_once(backend: str) -> None:
    averaged, source = torch.zeros(5), torch.ones(5)
    plan = Plan([averaged, averaged[:], averaged], [source, source, source[:]], backend=backend)
    plan.lerp_(0.5)
    assert torch.equal(averaged, torch.full((5,), 0.5))
    plan.swap_()
    assert torch.equal(averaged, torch.ones(5))
    assert plan.elements == 5


def test_one_memory_for_both_sides_is_left_alone(backend: str) -> None:
    tensor = torch.tensor([1.0, float("inf")])
    plan = Plan([tensor], [tensor.view(2)], backend=backend)
    plan.lerp_(0.5)  # inf - inf would be NaN
    plan.swap_()
    assert tensor.tolist() == [1.0, float("inf")]
    assert plan.elements == 0


def test_several_averages_of_one_source_are_fine(backend: str) -> None:
    source, averaged = torch.ones(5), [torch.zeros(5), torch.zeros(5)]
    Plan(averaged, [source, source], backend=backend).lerp_([0.25, 0.5])
    assert averaged[0].tolist() == [0.25] * 5
    assert averaged[1].tolist() == [0.5] * 5


def test_overlapping_tensors_are_refused_by_name() -> None:
    if backends.native() is None:
        pytest.skip("found where the chunk table is built")
    memory, other = torch.zeros(10), torch.ones(20)
    cases = [
        ([memory[:6], memory[5:]], [other[:6], other[6:11]], "averaged tensors overlap"),
        ([memory[:5], memory[5:]], [memory[3:8], other[:5]], "averaged tensor overlaps a source"),
        ([memory[:5], other[:5]], [other[:5], other[5:10]], "averaged tensor overlaps a source"),
        ([memory[:5]], [memory[1:6]], "averaged tensor overlaps a source"),
    ]
    for averaged, source, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            Plan(averaged, source, names=[f"layer{i}" for i in range(len(averaged))])
        assert "'layer0'" in str(caught.value)
    swaps = Plan([memory[:5], memory[5:]], [other[:5], other[3:8]])
    swaps.lerp_(0.5)
    with pytest.raises(ValueError, match="source tensors overlap in memory, and a swap writes"):
        swaps.swap_()


def test_tensors_that_come_to_overlap_are_refused_by_name() -> None:
    if backends.native() is None:
        pytest.skip("found where the chunk table is built")
    averaged = [torch.zeros(4), torch.zeros(4)]
    plan = Plan(averaged, [torch.ones(4), torch.ones(4)], names=["first", "second"])
    averaged[1].data = averaged[0].data
    with pytest.raises(ValueError, match="'first' and 'second': averaged tensors overlap"):
        plan.lerp_(0.5)
    assert averaged[0].tolist() == [0.0] * 4


def test_more_elements_than_32_bits_count() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the extension is not built")
    count, chunk = (1 << 33) + 5, 1 << 30
    base, other = 1 << 40, 1 << 41
    float32, bfloat16 = 1, 2
    table = native.chunk_table([(base, other, count, float32, bfloat16)], chunk)
    assert [size for _, _, size, _ in table] == [chunk] * 8 + [5]
    for i, (averaged, source, _, index) in enumerate(table):
        assert (averaged, source, index) == (base + 4 * i * chunk, other + 2 * i * chunk, 0)


def test_autograd_never_sees_an_update(backend: str) -> None:
    averaged = torch.zeros(3, requires_grad=True)
    Plan([averaged], [torch.ones(3, requires_grad=True)], backend=backend).lerp_(0.5)
    assert averaged.grad_fn is None
    assert averaged.tolist() == [0.5] * 3
