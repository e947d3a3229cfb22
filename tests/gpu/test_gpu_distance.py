"""The squared distance that the CUDA kernels measure: beside float64, unwaited for, in graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ema_fused import Plan
from tests.device import BACKEND, DEVICE, needs, nobody_waits, rather, synchronize

pytestmark = pytest.mark.gpu

AVERAGED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SOURCES = [*AVERAGED, torch.float8_e4m3fn, torch.float8_e5m2]
SIZES = [0, 1, 7, 16, 129, 4097, 16383, 16384, 16385, 100_003]
UPDATES = [
    *((arithmetic, "nearest") for arithmetic in ("lerp", "axpby", "delta", "products")),
    ("lerp", "stochastic"),
]
UNTOUCHED = -7.0
MEGA = rather(1 << 20, 1 << 12)


def tensors(dtype: torch.dtype, seed: int, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE) for n in sizes
    ]


def filled(value: float, count: int = MEGA) -> Tensor:
    return torch.full((count,), value, device=DEVICE)


def number(*shape: int) -> Tensor:
    return torch.full(shape, UNTOUCHED, dtype=torch.float64, device=DEVICE)


def distance(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> float:
    """In float64, by torch on the CPU."""
    pairs = zip(averaged, source, strict=True)
    return sum(float((s.cpu().double() - a.cpu().double()).square().sum()) for a, s in pairs)


def near(expected: float) -> object:
    return pytest.approx(expected, rel=1e-6, abs=0.0)


def kernels_of(run: Callable[[], object]) -> list[str]:
    """The names of the kernels that ``run`` puts on the device, one a launch."""
    run()
    needs("the profiler")
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize()
    return [event.name for event in profile.events() if "update_kernel" in event.name]


@pytest.mark.parametrize("update", UPDATES, ids="-".join)
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
@pytest.mark.parametrize("averaged_dtype", AVERAGED, ids=str)
def test_it_is_float64s_and_changes_no_average(
    averaged_dtype: torch.dtype, source_dtype: torch.dtype, update: tuple[str, str]
) -> None:
    averaged, source = tensors(averaged_dtype, 1), tensors(source_dtype, 2)
    averaged.append(averaged[-1][3:50_000].clone()[1:])  # aligned otherwise
    source.append(source[-1][4:50_000].clone())
    expected = distance(averaged, source)
    arithmetic, rounding = update
    runs = []
    for is_measured in (True, True, False):
        copies = [tensor.clone() for tensor in averaged]
        plan = Plan(copies, source, arithmetic=arithmetic, rounding=rounding, backend=BACKEND)
        found = number()
        plan.lerp_(0.3, squared_distance=found if is_measured else None)
        runs.append((found.item(), [tensor.view(torch.uint8) for tensor in copies]))
    assert runs[0][0] == near(expected)
    assert runs[1][0] == runs[0][0]  # the same bits
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], other[1], strict=True))


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_average_has_its_own(source_dtype: torch.dtype) -> None:
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float64]
    averaged = [tensors(dtype, k) for k, dtype in enumerate(dtypes)]
    averaged.append([tensor.new_zeros(tensor.numel() + 1)[1:] for tensor in averaged[0]])
    source = tensors(source_dtype, 99)
    expected = [distance(one, source) for one in averaged]
    found = number(len(averaged))
    weights = [0.1 * (k + 1) for k in range(len(averaged))]
    Plan(averaged, source, backend=BACKEND).lerp_(weights, squared_distance=found)
    assert found.tolist() == [near(value) for value in expected]


def test_a_large_plan_with_copies_is_one_measured_launch() -> None:
    averaged, source = (
        tensors(torch.float32, 1, [rather(50_000_003, 500_003)]),
        tensors(torch.float32, 2, [1, 7]),
    )
    averaged += [tensor + 3.0 for tensor in source]
    source.insert(0, averaged[0] + 0.25)
    averaged.append(torch.tensor(1, device=DEVICE))
    source.append(torch.tensor(9, device=DEVICE))
    plan = Plan(averaged, source, only_copy=[False, False, True, True], backend=BACKEND)
    expected, found = distance(averaged[:2], source[:2]), number()
    plan.lerp_(0.0, squared_distance=found)
    assert found.item() == near(expected)
    assert averaged[3].item() == 9
    (kernel,) = kernels_of(lambda: plan.lerp_(0.0, squared_distance=found))
    assert "measured_update_kernel" in kernel
    (kernel,) = kernels_of(lambda: plan.lerp_(0.0))
    assert "measured" not in kernel


def test_nobody_waits_for_it_and_a_flag_leaves_it_alone() -> None:
    plan = Plan([filled(0.0)], [filled(1.0)], backend=BACKEND)
    flag, weight, found = torch.ones((), device=DEVICE), torch.tensor(0.5, device=DEVICE), number()
    several = Plan([[filled(0.0)], [filled(1.0)]], [filled(3.0)], backend=BACKEND)
    both = number(2)
    plan.lerp_(0.0, squared_distance=found)  # builds what it needs
    found.fill_(UNTOUCHED)
    with nobody_waits():
        plan.lerp_(weight, found_inf=flag, squared_distance=found)
        skipped = found.clone()
        flag.fill_(float("nan"))
        plan.lerp_(weight, found_inf=flag, squared_distance=found)
        skipped_again = found.clone()
        flag.zero_()
        plan.lerp_(weight, found_inf=flag, squared_distance=found)
        several.lerp_([0.5, 0.25], squared_distance=both)
    assert (skipped.item(), skipped_again.item()) == (UNTOUCHED, UNTOUCHED)
    assert found.item() == MEGA
    assert plan.averaged[0].unique().tolist() == [0.5]
    assert both.tolist() == [9.0 * MEGA, 4.0 * MEGA]


def test_a_graph_measures_at_every_replay() -> None:
    averaged, source, found = (
        [filled(0.0), filled(0.0, 33)],
        [filled(1.0), filled(1.0, 33)],
        number(),
    )
    flag, momentum = torch.zeros((), device=DEVICE), torch.tensor(0.5, device=DEVICE)
    plan = Plan(averaged, source, backend=BACKEND)
    plan.lerp_(0.0, squared_distance=found)
    found.fill_(UNTOUCHED)
    needs("graphs")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.lerp_(momentum, found_inf=flag, squared_distance=found)
    assert found.item() == UNTOUCHED  # captured, not run
    others = [filled(777.0) for _ in range(8)]  # would take the graph's memory if it were free
    count, expected, told = MEGA + 33, 0.0, UNTOUCHED
    for target, skip in ((1.0, 0), (2.0, 0), (3.0, 1), (4.0, 0)):
        flag.fill_(skip)
        for tensor in source:
            tensor.fill_(target)
        graph.replay()
        if not skip:
            told = count * (target - expected) ** 2
            expected += 0.5 * (target - expected)
        assert found.item() == told
        assert averaged[1].unique().tolist() == [expected]
    assert all(other.unique().tolist() == [777.0] for other in others)


def test_it_is_there_in_the_order_of_a_side_stream() -> None:
    averaged, source, found = filled(0.0), filled(1.0), number()
    needs("streams")
    plan, side = Plan([averaged], [source], backend=BACKEND), torch.cuda.Stream()
    torch.cuda._sleep(50_000_000)
    source.fill_(3.0)  # behind the sleep: the update must see it
    plan.lerp_(0.5, stream=side, squared_distance=found)
    plan.wait()
    assert found.item() == 9.0 * MEGA
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
    plan.lerp_(0.5, stream=side, squared_distance=found)
    others = [filled(777.0) for _ in range(8)]  # no memory of the update is theirs
    plan.wait()
    assert found.item() == 2.25 * MEGA
    assert all(other.unique().tolist() == [777.0] for other in others)


def test_tensors_that_move_and_are_tied_on_the_way_are_measured() -> None:
    """The table has other entries than when the parts of the sum were counted."""
    averaged, source = [filled(0.0, 5000) for _ in range(9)], [filled(1.0, 5000) for _ in range(9)]
    apart = [tensor.data for tensor in averaged]
    plan, found = Plan(averaged, source, backend=BACKEND), number()
    plan.lerp_(0.0, squared_distance=found)
    assert found.item() == 45_000.0
    for a, s in zip(averaged[1:], source[1:], strict=True):
        a.data, s.data = averaged[0].data, source[0].data
    plan.lerp_(0.0, squared_distance=found)
    assert found.item() == 5000.0
    for a, memory in zip(averaged, apart, strict=True):
        a.data = memory
    plan.lerp_(0.0, squared_distance=found)
    assert found.item() == 45_000.0


@pytest.mark.parametrize("where", ["cpu", DEVICE], ids=["read-on-cpu", "read-on-device"])
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_parts_of_every_kind_add_up_on_any_device(where: str) -> None:
    averaged = [filled(0.0, 5000), torch.zeros(300), filled(0.0, 70), torch.zeros(50)]
    source = [filled(1.0, 5000), torch.ones(300), torch.ones(70), filled(2.0, 50)]
    averaged.append(torch.zeros(10, dtype=torch.complex64, device=DEVICE))
    source.append(torch.full((10,), 1.0 + 2.0j, device=DEVICE))
    plan = Plan(averaged, source)
    needs("two devices")
    assert set(plan.backends) == {"cuda", "cpu", "moved", "foreach"}
    found = torch.full((), UNTOUCHED, dtype=torch.float64, device=where)
    plan.lerp_(0.5, squared_distance=found)
    assert found.item() == 5000 + 300 + 70 + 4 * 50 + 5 * 10
    flag = torch.ones((), device=DEVICE)
    plan.lerp_(0.5, found_inf=flag, squared_distance=found)
    assert found.item() == 5000 + 300 + 70 + 4 * 50 + 5 * 10


def test_a_host_and_a_device_measure_without_waiting_for_the_device() -> None:
    averaged, source = [filled(0.0), torch.zeros(300)], [filled(1.0), torch.ones(300)]
    plan, found = Plan(averaged, source), number()
    plan.lerp_(0.0, squared_distance=found)
    with nobody_waits():
        plan.lerp_(0.0, squared_distance=found)
    assert found.item() == MEGA + 300


def test_nothing_is_at_distance_zero() -> None:
    found = number()
    Plan([filled(0.0, 0)], [filled(0.0, 0)], backend=BACKEND).lerp_(0.5, squared_distance=found)
    assert found.item() == 0.0


def test_no_memory_is_kept() -> None:
    plan, found = Plan([filled(0.0)], [filled(1.0)], backend=BACKEND), number()
    plan.lerp_(0.5, squared_distance=found)
    needs("a count of memory")
    synchronize()
    allocated = torch.cuda.memory_allocated()
    for _ in range(3):
        plan.lerp_(0.5, squared_distance=found)
    assert torch.cuda.memory_allocated() == allocated
