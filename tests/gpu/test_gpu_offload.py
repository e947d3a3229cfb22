"""Averages on the host of sources on a CUDA device: bits, order, memory, nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import Plan
from ema_fused.offloading.offloaded_plan import OffloadedPlan, host_memory
from tests.device import DEVICE, needs, nobody_waits, rather, synchronize

pytestmark = pytest.mark.gpu

MEGA = rather(1 << 20, 1 << 14)
SIZES = [0, 1, 7, 129, 4097, 16385, 100_003, 3 * MEGA + 5]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float16),
    (torch.float32, torch.float8_e4m3fn),
]


def tensors(dtype: torch.dtype, seed: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in SIZES]
    image = torch.randn(4, 3, 50, 50, generator=generator, dtype=torch.float64).to(dtype)
    made.append(image.to(memory_format=torch.channels_last))
    return [tensor.to(device) for tensor in made]


def slow() -> None:
    needs("streams")
    torch.cuda._sleep(100_000_000)  # some 60 ms


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("staging_bytes", [1024 * 64, 64 * MEGA])
@pytest.mark.parametrize("mode", ["lerp", "axpby", "delta", "products", "stochastic"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_bits_are_those_of_a_plan_on_the_host(
    dtypes: tuple[torch.dtype, torch.dtype], mode: str, staging_bytes: int
) -> None:
    averaged, source = tensors(dtypes[0], 1, "cpu"), tensors(dtypes[1], 2, DEVICE)
    averaged.append(torch.zeros((), dtype=torch.int64))
    source.append(torch.ones((), dtype=torch.int64, device=DEVICE))
    expected = [tensor.clone() for tensor in averaged]
    options: dict[str, Any] = {
        "arithmetic": "lerp" if mode == "stochastic" else mode,
        "rounding": "stochastic" if mode == "stochastic" else "nearest",
        "only_copy": [False] * len(SIZES) + [False, True],
        "numbers": [2 * i + 1 for i in range(len(averaged))],
    }
    plan = OffloadedPlan(averaged, source, staging_bytes=staging_bytes, **options)
    for step, weight in enumerate((0.1, 0.7, 0.001)):
        plan.lerp_(weight, seed=9, step=step)
        theirs = Plan(expected, [s.cpu() for s in source], **options)
        theirs.load_state_dict({"seed": 9, "step": step})
        theirs.lerp_(weight)
        plan.flush()
        assert equal(averaged, expected)
        for tensor in source:
            tensor.copy_((tensor.double() * 0.5).to(tensor.dtype))
    plan.copy_()
    plan.flush()
    assert equal(averaged, [s.cpu().to(a.dtype) for a, s in zip(averaged, source, strict=True)])


def test_sources_with_gaps_and_in_another_order() -> None:
    grid = torch.arange(12_000.0, device=DEVICE).view(100, 120)
    source = [grid.t(), grid[:, ::3], torch.tensor(3.0, device=DEVICE).expand(700)]
    averaged = [torch.ones(s.shape) for s in source]
    expected = [tensor.clone() for tensor in averaged]
    plan = OffloadedPlan(averaged, source, staging_bytes=4096)
    plan.lerp_(0.3)
    plan.flush()
    Plan(expected, [s.cpu() for s in source]).lerp_(0.3)
    assert equal(averaged, expected)


def test_averages_in_pinned_memory() -> None:
    source = nn.Parameter(torch.ones(1000, device=DEVICE, dtype=torch.bfloat16))
    average = host_memory(source, torch.float32)
    needs("pinned memory")
    assert average.is_pinned()
    assert average.dtype == torch.float32
    plan = OffloadedPlan([average], [source])
    plan.copy_()
    plan.flush()
    assert average.unique().tolist() == [1.0]


def test_the_device_holds_two_buffers_more_and_nothing_else() -> None:
    source = [torch.ones(n, device=DEVICE) for n in (1, 1000, MEGA, 5 * MEGA + 1, 64)]
    averaged = [torch.zeros(s.shape) for s in source]
    needs("a count of memory")
    before = torch.cuda.memory_allocated()
    plan = OffloadedPlan(averaged, source, staging_bytes=MEGA)
    assert plan.staged_bytes == MEGA
    held = torch.cuda.memory_allocated() - before
    assert held == 2 * MEGA
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        plan.lerp_(0.5)
        plan.wait_until_read()
    plan.flush()
    assert torch.cuda.max_memory_allocated() == before + held
    # Planned anew the old buffers go first, and with them the memory that was replaced.
    source[2].data = source[2].clone()
    torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.memory_allocated()
    plan.copy_()
    plan.flush()
    assert torch.cuda.max_memory_allocated() == peak
    assert torch.cuda.memory_allocated() == before + held
    del plan
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("staging_bytes", [1024 * 64, 64 * MEGA])
def test_a_training_that_writes_the_sources_right_after_they_are_read(staging_bytes: int) -> None:
    torch.manual_seed(0)
    width = rather(512, 24)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8))).to(DEVICE)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    averaged = [host_memory(p).copy_(p.detach()) for p in parameters]
    expected = [tensor.clone() for tensor in averaged]
    plan = OffloadedPlan(averaged, parameters, staging_bytes=staging_bytes)
    seen = []
    for _ in range(12):
        model(torch.randn(64, width, device=DEVICE)).square().mean().backward()
        plan.wait_until_read()
        optimizer.step()
        optimizer.zero_grad()
        seen.append([p.detach().clone() for p in parameters])
        plan.lerp_(0.1)
    plan.flush()
    for values in seen:
        Plan(expected, [value.cpu() for value in values]).lerp_(0.1)
    assert equal(averaged, expected)


def test_an_update_starts_behind_and_is_read_before_what_the_stream_holds() -> None:
    source = torch.zeros(MEGA, device=DEVICE)
    plan = OffloadedPlan([torch.zeros(MEGA)], [source], staging_bytes=1024 * 256)
    needs("streams")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow()
        source.fill_(3.0)  # the update must see it
        plan.lerp_(0.5)
        plan.wait_until_read()
        source.fill_(100.0)  # and not this
    plan.flush()
    assert plan.averaged[0].unique().tolist() == [1.5]


def test_starting_an_update_waits_for_nothing() -> None:
    source = torch.ones(MEGA, device=DEVICE)
    plan = OffloadedPlan([torch.zeros(MEGA)], [source], staging_bytes=1024 * 256)
    flag = torch.zeros(1, device=DEVICE)
    plan.lerp_(0.0, found_inf=flag)
    plan.flush()
    synchronize()
    slow()
    behind = torch.cuda.Event()
    behind.record()
    with nobody_waits():
        plan.lerp_(0.5, found_inf=flag)
        assert not behind.query()  # the device is still asleep
    plan.flush()
    assert plan.averaged[0].unique().tolist() == [0.5]


def test_a_flag_on_the_device_is_read_as_it_was() -> None:
    source, flag = torch.ones(MEGA, device=DEVICE), torch.zeros(1, device=DEVICE)
    plan = OffloadedPlan([torch.zeros(MEGA)], [source], staging_bytes=1024 * 256)
    for value, expected in ((1.0, 0.0), (0.0, 0.5), (torch.nan, 0.5), (0.0, 0.75)):
        slow()
        flag.fill_(value)
        plan.lerp_(0.5, found_inf=flag)
        flag.fill_(1.0 - value)
        plan.flush()
        assert plan.averaged[0].unique().tolist() == [expected]


def test_memory_that_is_freed_meanwhile_is_not_given_away() -> None:
    source = torch.ones(MEGA, device=DEVICE)
    plan = OffloadedPlan([torch.zeros(MEGA)], [source], staging_bytes=1024 * 256)
    needs("streams")
    stream = torch.cuda.Stream()
    slow()
    plan.lerp_(0.5)
    source.data = torch.zeros(1, device=DEVICE)
    with torch.cuda.stream(stream):  # it doesn't wait
        others = [torch.full((MEGA,), 9.0, device=DEVICE) for _ in range(4)]
    del source
    others += [torch.full((MEGA,), 9.0, device=DEVICE) for _ in range(4)]
    plan.flush()
    assert plan.averaged[0].unique().tolist() == [0.5]


def test_a_plan_may_go_in_the_middle_of_its_update() -> None:
    averaged, source = [torch.zeros(MEGA)], [torch.ones(MEGA, device=DEVICE)]
    plan = OffloadedPlan(averaged, source, staging_bytes=1024 * 256)
    slow()
    plan.lerp_(0.5)
    thread = plan._worker.thread if plan._worker else None
    del plan
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()
    assert averaged[0].unique().tolist() == [0.5]


def test_a_capture_is_refused() -> None:
    averaged, source = [torch.zeros(100)], [torch.ones(100, device=DEVICE)]
    plan = OffloadedPlan(averaged, source)
    needs("graphs")
    with (
        pytest.raises(RuntimeError, match="while a CUDA graph is being captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        plan.lerp_(0.5)
    synchronize()
    plan.lerp_(0.5)
    plan.flush()
    assert averaged[0].unique().tolist() == [0.5]


def test_sources_on_the_host_and_on_a_device_together() -> None:
    source = [torch.full((3000,), float(i)).to((DEVICE, "cpu")[i % 2]) for i in range(6)]
    averaged = [torch.zeros(3000) for _ in source]
    plan = OffloadedPlan(averaged, source, staging_bytes=4096)
    flag = torch.zeros((), device=DEVICE)
    for _ in range(2):
        plan.lerp_(0.5, found_inf=flag)
        plan.flush()
    assert [a.unique().tolist() for a in averaged] == [[i * 0.75] for i in range(6)]


def test_averages_stay_on_the_host() -> None:
    needs("two devices")
    on_device = [torch.zeros(3, device=DEVICE)]
    with pytest.raises(ValueError, match=r"pair 0: the averaged tensor is on cuda:0"):
        OffloadedPlan(on_device, [torch.ones(3, device=DEVICE)])
