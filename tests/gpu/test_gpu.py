"""The CUDA kernels' results beside torch's and beside the CPU's, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ema_fused import Plan
from tests.device import BACKEND, DEVICE

pytestmark = pytest.mark.gpu

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SOURCES = [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2]
SIZES = [0, 1, 7, 16, 129, 4097, 16383, 16384, 16385, 100_003]


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE) for n in SIZES
    ]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f.cpu(), e.cpu()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", [0.0002, 0.5, 0.8])
def test_lerp_equals_torch_to_the_bit(dtype: torch.dtype, weight: float) -> None:
    averaged, source = tensors(dtype, 1), tensors(dtype, 2)
    expected = [tensor.clone() for tensor in averaged]
    plan = Plan(averaged, source, backend=BACKEND)
    plan.lerp_(weight)
    torch._foreach_lerp_(expected, source, weight)
    assert all(torch.equal(a, e) for a, e in zip(averaged, expected, strict=True))


@pytest.mark.parametrize("arithmetic", ["lerp", "axpby", "delta", "products"])
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
@pytest.mark.parametrize("averaged_dtype", FLOATS, ids=str)
def test_cuda_and_cpu_give_the_same_bits(
    averaged_dtype: torch.dtype, source_dtype: torch.dtype, arithmetic: str
) -> None:
    averaged, source = tensors(averaged_dtype, 3), tensors(source_dtype, 4)
    on_cpu = [tensor.to("cpu", copy=True) for tensor in averaged]
    weights = [0.1 * i for i in range(len(SIZES))]
    Plan(averaged, source, arithmetic=arithmetic, backend=BACKEND).lerp_(weights)
    plan = Plan(on_cpu, [t.cpu() for t in source], arithmetic=arithmetic, backend="cpu")
    plan.lerp_(weights)
    assert equal(averaged, on_cpu)


@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
@pytest.mark.parametrize("averaged_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_gives_the_cpus_bits(
    averaged_dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    averaged, source = tensors(averaged_dtype, 3), tensors(source_dtype, 4)
    averaged.append(averaged[-1][3:50_000].clone()[1:])  # aligned otherwise
    source.append(source[-1][3:50_000].clone()[1:])
    on_cpu = [tensor.to("cpu", copy=True) for tensor in averaged]
    on_gpu = Plan(averaged, source, rounding="stochastic", seed=2**40 + 5, backend=BACKEND)
    beside = Plan(
        on_cpu, [t.cpu() for t in source], rounding="stochastic", seed=2**40 + 5, backend="cpu"
    )
    for weight in (0.001, 0.7, 0.3):
        on_gpu.lerp_(weight)
        beside.lerp_(weight)
    assert equal(averaged, on_cpu)
    on_foreach = [tensor.to(DEVICE, copy=True) for tensor in on_cpu]
    for averages, backend in ((averaged, BACKEND), (on_foreach, "foreach")):
        plan = Plan(averages, source, rounding="stochastic", backend=backend)
        plan.lerp_(0.01, step=7)
    assert equal(averaged, on_foreach)


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_averages_are_each_what_they_would_be_alone(source_dtype: torch.dtype) -> None:
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float64]
    averaged = [tensors(dtype, k) for k, dtype in enumerate(dtypes)]
    averaged.append([tensor.new_zeros(tensor.numel() + 1)[1:] for tensor in averaged[0]])
    expected = [[tensor.clone() for tensor in one] for one in averaged]
    source = tensors(source_dtype, 99)
    weights = [0.1 * (k + 1) for k in range(len(averaged))]
    plan = Plan(averaged, source, backend=BACKEND)
    assert plan.launches == 1
    plan.lerp_(weights)
    for one, weight, found in zip(expected, weights, averaged, strict=True):
        Plan(one, source, backend=BACKEND).lerp_(weight)
        assert equal(found, one)


@pytest.mark.parametrize("averaged_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
def test_copies_convert_as_torch_does(
    averaged_dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    averaged, source = tensors(averaged_dtype, 1), tensors(source_dtype, 2)
    Plan(averaged, source, backend=BACKEND).copy_()
    assert equal(averaged, [tensor.to(averaged_dtype) for tensor in source])


def test_every_layout_of_one_plan_is_right() -> None:
    memory = [torch.randn(1000, device=DEVICE) for _ in range(4)]
    image = torch.randn(4, 3, 5, 5, device=DEVICE).to(memory_format=torch.channels_last)
    averaged = [memory[0][1:], memory[1][3:900], torch.tensor(1, device=DEVICE), image]
    source = [memory[2][:-1], memory[3][2:899].bfloat16(), torch.tensor(5, device=DEVICE)]
    source.append(torch.randn_like(image))
    expected = [torch.lerp(averaged[0], source[0], 0.3)]
    expected.append(torch.lerp(averaged[1], source[1].float(), 0.3))
    expected.append(source[2].clone())
    expected.append(torch.lerp(averaged[3], source[3], 0.3))
    plan = Plan(averaged, source, only_copy=[False, False, True, False], backend=BACKEND)
    plan.lerp_(0.3)
    assert equal(averaged, expected)


@pytest.mark.parametrize("where", ["cpu", DEVICE], ids=["averages-on-cpu", "averages-on-device"])
def test_sources_are_brought_to_the_averages_device(where: str) -> None:
    there = DEVICE if where == "cpu" else "cpu"
    averaged = [torch.zeros(5000, device=where), torch.zeros(3, device=where)]
    source = [torch.ones(5000, device=there), torch.ones(3, device=there, dtype=torch.bfloat16)]
    Plan(averaged, source).lerp_(0.25)
    for tensor in averaged:
        assert torch.equal(tensor.cpu(), torch.full(tensor.shape, 0.25))


def test_replaced_storage_is_followed() -> None:
    averaged, source = torch.zeros(1000, device=DEVICE), torch.ones(1000, device=DEVICE)
    plan = Plan([averaged], [source], backend=BACKEND)
    for step in range(10):
        source.data = torch.full((1000,), float(step), device=DEVICE)
        plan.lerp_(1.0)
        assert torch.equal(averaged, source)
