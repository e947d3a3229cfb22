"""The arithmetic of every backend: beside torch to the bit, and beside float64."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ema_fused
from ema_fused import Plan
from ema_fused.engine import reference
from ema_fused.engine.plan import ARITHMETICS
from tests import processes
from tests.engine import instruction_sets
from tests.threads import on_threads

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 15, 16, 17, 127, 128, 129, 4095, 4096, 4097, 8191, 8192, 8193]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-45, 6e-8, 65519.0, 3e38]
WEIGHTS = [0.0, 1.0, 0.5, 0.4999999999, 0.5000000001, 0.0002, 0.9998, -0.3, 1.7, -0.5]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, special: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    if special and tensor.numel():
        flat = tensor.view(-1)
        places = torch.randperm(flat.numel(), generator=generator)[: len(SPECIAL)]
        flat[places] = torch.tensor(SPECIAL, dtype=torch.float64)[: len(places)]
    return tensor.to(dtype)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, but that any NaN is as good as another."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    both_nan = found.isnan() & expected.isnan()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[found.itemsize]
    differ = (found.contiguous().view(integers) != expected.contiguous().view(integers)) & ~both_nan
    assert not differ.any(), f"{int(differ.sum())} of {found.numel()} elements differ"


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
weights = st.one_of(st.sampled_from(WEIGHTS), st.floats(-2.0, 3.0, width=64))


@given(
    sizes=st.lists(shapes, min_size=1, max_size=5),
    dtype=st.sampled_from(FLOATS),
    weight=weights,
    seed=st.integers(0, 2**32),
    special=st.booleans(),
)
def test_lerp_equals_torch_to_the_bit(
    backend: str,
    sizes: list[tuple[int, ...]],
    dtype: torch.dtype,
    weight: float,
    seed: int,
    special: bool,
) -> None:
    averaged = [values(shape, dtype, seed + i, special) for i, shape in enumerate(sizes)]
    source = [values(shape, dtype, seed - i - 1, special) for i, shape in enumerate(sizes)]
    expected = [tensor.clone() for tensor in averaged]
    Plan(averaged, source, backend=backend).lerp_(weight)
    torch._foreach_lerp_(expected, source, weight)
    for found, wanted in zip(averaged, expected, strict=True):
        if weight == 1.0:
            # The sign of a zero result: torch's vectors and its last elements disagree on it here.
            found, wanted = found + 0.0, wanted + 0.0
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_size_around_the_chunks_equals_torch(
    backend: str, dtype: torch.dtype, threads: int
) -> None:
    with on_threads(threads):
        sizes = SIZES * 3 + [100_003]
        averaged = [values((n,), dtype, i, True) for i, n in enumerate(sizes)]
        source = [values((n,), dtype, -i - 1, True) for i, n in enumerate(sizes)]
        expected = [tensor.clone() for tensor in averaged]
        Plan(averaged, source, backend=backend).lerp_(0.0002)
        torch._foreach_lerp_(expected, source, 0.0002)
        for found, wanted in zip(averaged, expected, strict=True):
            assert_same_bits(found, wanted)


def as_original(averaged: Tensor, source: Tensor, weight: float, arithmetic: str) -> Tensor:
    """What the systems of each arithmetic write."""
    if arithmetic == "lerp":
        return averaged.lerp_(source, weight)
    if arithmetic == "axpby":
        return averaged.mul_(1 - weight).add_(source, alpha=weight)
    if arithmetic == "products":
        return averaged * (1 - weight) + source * weight
    return averaged.add_(source - averaged, alpha=weight)


@given(
    n=st.sampled_from([*SIZES, 40_001]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    arithmetic=st.sampled_from(["axpby", "delta", "products"]),
    weight=weights,
    seed=st.integers(0, 2**32),
)
def test_the_other_arithmetics_equal_their_originals_to_the_bit(
    backend: str, n: int, dtype: torch.dtype, arithmetic: str, weight: float, seed: int
) -> None:
    averaged, source = values((n,), dtype, seed, True), values((n,), dtype, -seed - 1, True)
    expected = as_original(averaged.clone(), source, weight, arithmetic)
    Plan([averaged], [source], arithmetic=arithmetic, backend=backend).lerp_(weight)
    assert_same_bits(averaged, expected)


@pytest.mark.parametrize("arithmetic", ["axpby", "delta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_sixteen_bit_originals_are_met_to_the_bit(arithmetic: str, dtype: torch.dtype) -> None:
    averaged, source = values((100_003,), dtype, 1, False), values((100_003,), dtype, 2, False)
    expected = as_original(averaged.clone(), source, 0.3, arithmetic)
    plan = Plan([averaged], [source], arithmetic=arithmetic)
    plan.lerp_(0.3)
    assert plan.backends == ("foreach",)
    assert_same_bits(averaged, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_products_are_met_to_the_bit_by_every_backend(
    dtype: torch.dtype, backend: str
) -> None:
    averaged, source = values((100_003,), dtype, 1, False), values((100_003,), dtype, 2, False)
    expected = as_original(averaged, source, 0.3, "products")
    Plan([averaged], [source], arithmetic="products", backend=backend).lerp_(0.3)
    assert_same_bits(averaged, expected)


@pytest.mark.parametrize("arithmetic", ["lerp", "axpby", "delta", "products"])
@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("averaged_dtype", FLOATS, ids=str)
def test_every_pair_of_dtypes_is_within_rounding_of_float64(
    backend: str, averaged_dtype: torch.dtype, source_dtype: torch.dtype, arithmetic: str
) -> None:
    averaged = values((5003,), averaged_dtype, 3, False)
    source = values((5003,), source_dtype, 4, False)
    a, s = averaged.double().numpy(), source.double().numpy()
    for weight in (0.003, 0.8):
        found = averaged.clone()
        Plan([found], [source], arithmetic=arithmetic, backend=backend).lerp_(weight)
        bound = reference.tolerance(torch.finfo(averaged_dtype).eps, a, s, weight * (s - a))
        difference = np.abs(found.double().numpy() - reference.average(a, s, weight))
        assert (difference <= bound).all()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("averaged_dtype", FLOATS, ids=str)
def test_backends_agree_to_the_bit_on_mixed_dtypes(
    averaged_dtype: torch.dtype, source_dtype: torch.dtype, arithmetic: str
) -> None:
    if ema_fused.engine.backends.native() is None:
        pytest.skip("the extension is not built")
    if averaged_dtype is source_dtype:
        pytest.skip("equal dtypes have torch's bits, which other tests look at")
    source = values((5003,), source_dtype, 6, True)
    start = values((5003,), averaged_dtype, 5, True)
    for weight in (0.003, 0.8):
        native, foreach = start.clone(), start.clone()
        Plan([native], [source], backend="cpu", arithmetic=arithmetic).lerp_(weight)
        Plan([foreach], [source], backend="foreach", arithmetic=arithmetic).lerp_(weight)
        assert_same_bits(native, foreach)


@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("averaged_dtype", FLOATS, ids=str)
def test_copies_convert_as_torch_does(
    backend: str, averaged_dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    source = values((4099,), source_dtype, 7, True)
    found = torch.zeros(4099, dtype=averaged_dtype)
    Plan([found], [source], backend=backend).copy_()
    assert_same_bits(found, source.to(averaged_dtype))


@pytest.mark.parametrize(
    "dtype", [*FLOATS, torch.int64, torch.int8, torch.bool, torch.complex64], ids=str
)
def test_swaps_exchange_every_bit(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype.is_complex and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("complex tensors have a kernel on x86-64 only")
    bits = torch.randint(0, 2, (1000,)).to(dtype), torch.randint(0, 2, (1000,)).to(dtype)
    averaged, source = bits[0].clone(), bits[1].clone()
    Plan([averaged], [source], backend=backend).swap_()
    assert torch.equal(averaged, bits[1])
    assert torch.equal(source, bits[0])


def test_dtypes_mix_within_one_launch(backend: str) -> None:
    dtypes = [(a, s) for a in FLOATS for s in FLOATS]
    averaged = [torch.ones(7, dtype=a) for a, _ in dtypes] + [torch.tensor(3), torch.tensor(True)]
    source = [torch.zeros(7, dtype=s) for _, s in dtypes] + [torch.tensor(9), torch.tensor(False)]
    only_copy = [False] * len(dtypes) + [True, True]
    plan = Plan(averaged, source, only_copy=only_copy, backend=backend)
    plan.lerp_(0.5)
    for tensor in averaged[: len(dtypes)]:
        assert torch.equal(tensor, torch.full_like(tensor, 0.5))
    assert averaged[-2] == 9
    assert not averaged[-1]
    assert plan.launches == (1 if backend == "cpu" else 0)


def test_each_pair_may_have_its_own_weight(backend: str) -> None:
    averaged = [torch.zeros(5), torch.zeros(9000), torch.zeros((), dtype=torch.float64)]
    source = [torch.ones_like(tensor) for tensor in averaged]
    Plan(averaged, source, backend=backend).lerp_([0.25, 0.5, 0.75])
    for tensor, weight in zip(averaged, (0.25, 0.5, 0.75), strict=True):
        assert torch.equal(tensor, torch.full_like(tensor, weight))


@pytest.mark.parametrize(
    "weight", [torch.tensor(0.25), torch.tensor(1, dtype=torch.int64), 1, True]
)
def test_numbers_of_other_kinds_are_weights(backend: str, weight: float | Tensor) -> None:
    averaged = [torch.zeros(5)]
    Plan(averaged, [torch.ones(5)], backend=backend).lerp_(weight)
    assert torch.equal(averaged[0], torch.full((5,), float(weight)))


def test_stateless_calls_do_what_plans_do() -> None:
    averaged, source = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.zeros(2, 2)]
    ema_fused.lerp_(averaged, source, 0.25)
    assert torch.equal(averaged[0], torch.full((3,), 0.25))
    ema_fused.swap_(averaged, source)
    assert torch.equal(source[0], torch.full((3,), 0.25))
    ema_fused.copy_(averaged, source)
    assert torch.equal(averaged[0], source[0])


def test_weight_tensors_are_taken_as_torch_takes_them() -> None:
    averaged, source = [torch.zeros(3), torch.zeros(2, 2)], [torch.ones(3), torch.ones(2, 2)]
    by_element = [torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.25], [0.75]])]
    ema_fused.lerp_(averaged, source, by_element)
    assert torch.equal(averaged[0], by_element[0])
    assert torch.equal(averaged[1], by_element[1].expand(2, 2))


BESIDE_TORCH = """
import torch
from ema_fused import Plan
from ema_fused.engine import backends
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    averaged = [torch.randn(n, dtype=torch.float64).to(dtype) for n in (3, 1000, 50_001)]
    source = [torch.randn(n, dtype=torch.float64).to(dtype) for n in (3, 1000, 50_001)]
    expected = [tensor.clone() for tensor in averaged]
    for weight in (0.01, 0.6):
        Plan(averaged, source, backend="cpu").lerp_(weight)
        torch._foreach_lerp_(expected, source, weight)
    assert all(torch.equal(a, e) for a, e in zip(averaged, expected)), dtype
print(backends.native().cpu_isa(), torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("capability", instruction_sets.ALL)
@pytest.mark.slow
def test_kernels_follow_torch_to_every_instruction_set(capability: str) -> None:
    native = ema_fused.engine.backends.native()
    if native is None or "avx2" not in native.build_info()["cpu_isas"]:
        pytest.skip("this build has one instruction set")
    if capability not in instruction_sets.available():
        pytest.skip(f"this processor has no {capability}")
    done = processes.run("-c", BESIDE_TORCH, ATEN_CPU_CAPABILITY=capability)
    ours, torchs = done.stdout.split()
    assert {"baseline": "DEFAULT"}.get(ours, ours.upper()) == torchs


def test_flushed_subnormals_do_not_reach_float16(backend: str) -> None:
    """float16 subnormals are ordinary float32 numbers, flushing or not."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormals")
    try:
        averaged = torch.arange(1, 1024).to(torch.int16).view(torch.float16)
        expected = averaged.clone()
        source = torch.zeros(1023, dtype=torch.float16)
        Plan([averaged], [source], backend=backend).lerp_(0.25)
        torch._foreach_lerp_([expected], [source], 0.25)
        assert_same_bits(averaged, expected)
    finally:
        torch.set_flush_denormal(False)
