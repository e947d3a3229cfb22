"""The CUDA kernels beside torch's and beside the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ema_fused import Plan

pytestmark = pytest.mark.gpu

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 16, 129, 4097, 16383, 16384, 16385, 100_003]


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).to("cuda") for n in SIZES
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", [0.0002, 0.5, 0.8])
def test_lerp_equals_torch_to_the_bit(dtype: torch.dtype, weight: float) -> None:
    averaged, source = tensors(dtype, 1), tensors(dtype, 2)
    expected = [tensor.clone() for tensor in averaged]
    plan = Plan(averaged, source, backend="cuda")
    plan.lerp_(weight)
    torch._foreach_lerp_(expected, source, weight)
    assert all(torch.equal(a, e) for a, e in zip(averaged, expected, strict=True))


@pytest.mark.parametrize("arithmetic", ["lerp", "axpby", "delta"])
@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("averaged_dtype", FLOATS, ids=str)
def test_cuda_and_cpu_give_the_same_bits(
    averaged_dtype: torch.dtype, source_dtype: torch.dtype, arithmetic: str
) -> None:
    averaged, source = tensors(averaged_dtype, 3), tensors(source_dtype, 4)
    on_cpu = [tensor.cpu() for tensor in averaged]
    weights = [0.1 * i for i in range(len(SIZES))]
    Plan(averaged, source, arithmetic=arithmetic, backend="cuda").lerp_(weights)
    plan = Plan(on_cpu, [t.cpu() for t in source], arithmetic=arithmetic, backend="cpu")
    plan.lerp_(weights)
    assert all(torch.equal(a.cpu(), c) for a, c in zip(averaged, on_cpu, strict=True))


def test_misaligned_views_and_mixed_kinds_take_one_launch() -> None:
    memory = [torch.randn(1000, device="cuda") for _ in range(4)]
    averaged = [memory[0][1:], memory[1][3:900], torch.tensor(1, device="cuda")]
    source = [memory[2][:-1], memory[3][2:899].bfloat16(), torch.tensor(5, device="cuda")]
    expected = [torch.lerp(averaged[0], source[0], 0.3)]
    expected.append(torch.lerp(averaged[1], source[1].float(), 0.3))
    plan = Plan(averaged, source, only_copy=[False, False, True], backend="cuda")
    plan.lerp_(0.3)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        plan.lerp_(0.0)
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if "update_kernel" in event.key]
    assert plan.launches == 1
    assert len(kernels) == 1
    assert torch.equal(averaged[0], expected[0])
    assert torch.equal(averaged[1], expected[1])
    assert averaged[2] == 5


def test_swap_takes_no_memory_and_copy_converts() -> None:
    averaged, source = tensors(torch.float32, 5), tensors(torch.float32, 6)
    before = [tensor.clone() for tensor in averaged], [tensor.clone() for tensor in source]
    plan = Plan(averaged, source, backend="cuda")
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    plan.swap_()
    assert torch.cuda.max_memory_allocated() == allocated
    assert all(torch.equal(a, s) for a, s in zip(averaged, before[1], strict=True))
    assert all(torch.equal(s, a) for s, a in zip(source, before[0], strict=True))
    halves = tensors(torch.bfloat16, 7)
    Plan(averaged, halves, backend="cuda").copy_()
    assert all(torch.equal(a, h.float()) for a, h in zip(averaged, halves, strict=True))


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_sources_are_brought_to_the_averages_device(where: str) -> None:
    there = "cuda" if where == "cpu" else "cpu"
    averaged = [torch.zeros(5000, device=where), torch.zeros(3, device=where)]
    source = [torch.ones(5000, device=there), torch.ones(3, device=there, dtype=torch.bfloat16)]
    Plan(averaged, source).lerp_(0.25)
    for tensor in averaged:
        assert torch.equal(tensor.cpu(), torch.full(tensor.shape, 0.25))


def test_updates_run_on_the_current_stream_and_leave_the_device() -> None:
    averaged, source = torch.zeros(1 << 20, device="cuda"), torch.ones(1 << 20, device="cuda")
    plan = Plan([averaged], [source], backend="cuda")
    stream = torch.cuda.Stream()
    device = torch.cuda.current_device()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            source.mul_(1.0)
            plan.lerp_(0.5)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.cuda.current_device() == device
    assert torch.equal(averaged, torch.full_like(averaged, 1 - 0.5**20))


def test_replaced_storage_is_followed() -> None:
    averaged, source = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    plan = Plan([averaged], [source], backend="cuda")
    for step in range(10):
        source.data = torch.full((1000,), float(step), device="cuda")
        plan.lerp_(1.0)
        assert torch.equal(averaged, source)
