"""How the CUDA kernels are run: launches, streams, graphs, flags on the device, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ema_fused
from ema_fused import ExponentialMovingAverage, Plan
from tests.device import BACKEND, DEVICE, needs, nobody_waits, rather, synchronize

pytestmark = pytest.mark.gpu

MEGA = rather(1 << 20, 1 << 12)


def filled(value: float, count: int = MEGA, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((count,), value, device=DEVICE, dtype=dtype)


def kernels_of(run: Callable[[], object]) -> list[str]:
    """The names of the kernels and copies that ``run`` puts on the device, one a launch."""
    run()  # builds what it needs
    needs("the profiler")
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize()
    names = [event.name for event in profile.events()]
    return [name for name in names if "kernel" in name or name.startswith(("Memcpy", "Memset"))]


def mixed_plan(rounding: str = "nearest") -> Plan:
    averaged, source, only_copy = [], [], []
    for i in range(400):
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[i % 4]
        averaged.append(filled(1.0, 37 * i + 1, dtype))
        source.append(filled(2.0, 37 * i + 1, (torch.bfloat16, dtype)[i % 2]))
        only_copy.append(False)
    averaged.append(torch.zeros((), dtype=torch.int64, device=DEVICE))
    source.append(torch.ones((), dtype=torch.int64, device=DEVICE))
    averaged.append(torch.zeros(5, dtype=torch.bool, device=DEVICE))
    source.append(torch.ones(5, dtype=torch.bool, device=DEVICE))
    return Plan(
        averaged, source, only_copy=[*only_copy, True, True], rounding=rounding, backend=BACKEND
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_all_sizes_and_dtypes_take_one_launch(rounding: str) -> None:
    plan = mixed_plan(rounding)
    assert plan.launches == 1
    for run in (lambda: plan.lerp_(0.1), plan.copy_):
        (kernel,) = kernels_of(run)
        assert "update_kernel" in kernel
    equal_dtypes = Plan([filled(0.0), filled(0.0, 77)], [filled(1.0), filled(1.0, 77)])
    (kernel,) = kernels_of(equal_dtypes.swap_)
    assert "update_kernel" in kernel


def test_scalars_on_the_device_cost_no_other_launch() -> None:
    plan = mixed_plan()
    weight, flag = torch.tensor(0.1, device=DEVICE), torch.zeros(1, device=DEVICE)
    (kernel,) = kernels_of(lambda: plan.lerp_(weight, found_inf=flag))
    assert "update_kernel" in kernel


def test_several_averages_take_one_launch() -> None:
    averaged = [[filled(0.0), filled(0.0, 99)] for _ in range(4)]
    plan = Plan(averaged, [filled(1.0), filled(1.0, 99)])
    (kernel,) = kernels_of(lambda: plan.lerp_([0.1, 0.2, 0.3, 0.4]))
    assert "update_kernel" in kernel
    assert plan.launches == 1


def test_a_models_update_is_one_launch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 5)).to(DEVICE)
    average = ExponentialMovingAverage(model, momentum=0.1)
    average.update_parameters(model)  # copies
    names = kernels_of(lambda: average.update_parameters(model))
    # Beside it the count of steps is written, one number.
    assert sum("update_kernel" in name for name in names) == 1
    assert len(names) <= 2, names


@pytest.mark.parametrize("operation", ["lerp_", "copy_", "swap_", "several", "stochastic"])
def test_updates_take_no_memory(operation: str) -> None:
    averaged = [filled(1.0, n) for n in (1, 1000, MEGA, 3 * MEGA + 1)]
    source = [filled(2.0, n) for n in (1, 1000, MEGA, 3 * MEGA + 1)]
    runs: dict[str, Callable[[], object]]
    plan = Plan(averaged, source)
    several = Plan([averaged, [torch.zeros_like(a) for a in averaged]], source)
    halves = Plan([a.bfloat16() for a in averaged], source, rounding="stochastic")
    runs = {
        "lerp_": lambda: plan.lerp_(0.1),
        "copy_": plan.copy_,
        "swap_": plan.swap_,
        "several": lambda: several.lerp_([0.1, 0.2]),
        "stochastic": lambda: halves.lerp_(0.1),
    }
    runs[operation]()
    needs("a count of memory")
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    for _ in range(3):
        runs[operation]()
    synchronize()
    assert torch.cuda.max_memory_allocated() == allocated
    assert torch.cuda.memory_allocated() == allocated


def test_swaps_exchange_every_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64):
        first = torch.arange(100_003, device=DEVICE).to(dtype)
        second = first.flip(0) if dtype != torch.float8_e5m2 else first.float().flip(0).to(dtype)
        expected = second.clone(), first.clone()
        Plan([first], [second], backend=BACKEND).swap_()
        assert torch.equal(first.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(second.view(torch.uint8), expected[1].view(torch.uint8))


# ---- Numbers on the device -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_a_weight_is_read_on_the_device(dtype: torch.dtype) -> None:
    averaged, source = filled(1.0), filled(3.0)
    plan = Plan([averaged], [source], backend=BACKEND)
    weight = torch.tensor(0.25, device=DEVICE).to(dtype)
    with nobody_waits():
        plan.lerp_(weight)
    assert averaged.unique().tolist() == [1.0 + 2.0 * float(weight)]


def test_each_average_reads_its_weight() -> None:
    averaged = [[filled(0.0)], [filled(0.0)], [filled(0.0)]]
    plan = Plan(averaged, [filled(1.0)])
    on_device = torch.tensor(0.5, device=DEVICE), torch.tensor(0.125, device=DEVICE).double()
    plan.lerp_([on_device[0], 0.25, on_device[1]])
    assert [one[0].unique().tolist() for one in averaged] == [[0.5], [0.25], [0.125]]


def test_a_flag_on_the_device_stops_the_update() -> None:
    averaged = [filled(1.0), torch.tensor(1, device=DEVICE)]
    source = [filled(3.0), torch.tensor(9, device=DEVICE)]
    plan = Plan(averaged, source, only_copy=[False, True], backend=BACKEND)
    flag = torch.ones((), device=DEVICE)
    with nobody_waits():
        plan.lerp_(0.5, found_inf=flag)
        flag.zero_()
        plan.lerp_(0.25, found_inf=flag)
        flag.fill_(float("nan"))
        plan.lerp_(0.5, found_inf=flag)
    assert averaged[0].unique().tolist() == [1.5]
    assert averaged[1] == 9


def test_a_gradient_scalers_flag_needs_no_waiting() -> None:
    weight = nn.Parameter(filled(0.0))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    averaged = filled(1.0)
    plan = Plan([averaged], [weight], backend=BACKEND)
    for gradient, skipped in ((1.0, False), (float("inf"), True), (1.0, False)):
        before = averaged.clone()
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        flag = scaler._found_inf_per_device(optimizer)[weight.device]
        scaler.step(optimizer)
        plan.lerp_(0.5, found_inf=flag)
        scaler.update()
        assert torch.equal(averaged, before) == skipped


# ---- Graphs --------------------------------------------------------------------------------------


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    needs("graphs")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def test_a_captured_update_reads_a_momentum_that_changes() -> None:
    averaged, source = [filled(0.0), filled(0.0, 33)], [filled(1.0), filled(1.0, 33)]
    momentum = torch.tensor(0.5, device=DEVICE)
    flag = torch.zeros((), device=DEVICE)
    plan = Plan(averaged, source, backend=BACKEND)
    graph = captured(lambda: plan.lerp_(momentum, found_inf=flag))
    assert not averaged[0].any()  # captured, not run
    expected = 0.0
    for weight, target, skip in ((0.5, 1.0, 0), (0.25, 2.0, 0), (0.5, 3.0, 1), (0.125, 4.0, 0)):
        momentum.fill_(weight)
        flag.fill_(skip)
        for tensor in source:
            tensor.fill_(target)
        graph.replay()
        expected += 0.0 if skip else weight * (target - expected)
        assert averaged[0].unique().tolist() == [expected]
        assert averaged[1].unique().tolist() == [expected]


def test_a_graph_keeps_its_table_while_the_plan_moves_on() -> None:
    averaged, source = filled(0.0), filled(1.0)
    elsewhere = filled(5.0)
    first = source.data
    plan = Plan([averaged], [source], backend=BACKEND)
    graph = captured(lambda: plan.lerp_(0.5))
    for _ in range(3):  # other memory, other tables; the old one must stay for the graph
        source.data = elsewhere.clone()
        plan.lerp_(1.0)
    assert averaged.unique().tolist() == [5.0]
    first.fill_(1.0)
    graph.replay()
    assert averaged.unique().tolist() == [3.0]


@pytest.mark.parametrize("streams", [1, 2])
def test_tensors_that_moved_are_followed_into_a_capture(streams: int) -> None:
    averaged, source = filled(0.0), filled(1.0)
    plan = Plan([averaged], [source], backend=BACKEND)
    if streams == 2:
        needs("streams")
        plan.lerp_(0.0, stream=torch.cuda.Stream())
        plan.wait()
        synchronize()
        plan.wait()
    plan.lerp_(0.5)
    source.data = filled(2.5)
    graph = captured(lambda: plan.lerp_(0.5))  # the new table is uploaded beside the capture
    graph.replay()
    assert averaged.unique().tolist() == [1.5]


def test_a_graph_keeps_the_table_of_a_plan_that_is_gone() -> None:
    averaged, source = filled(0.0), filled(1.0)
    graph = captured(lambda: ema_fused.lerp_([averaged], [source], 0.5))
    plans = [Plan([filled(9.0)], [filled(9.0)], backend=BACKEND) for _ in range(50)]
    for plan in plans:  # would take the table's memory if it were free
        plan.lerp_(0.5)
    graph.replay()
    graph.replay()
    assert averaged.unique().tolist() == [0.75]
    # A table that is replaced because the layout is another is kept as well.
    image, other = filled(0.0, 600).view(2, 3, 10, 10), filled(1.0, 600).view(2, 3, 10, 10)
    plan = Plan([image], [other], backend=BACKEND)
    graph = captured(lambda: plan.lerp_(0.5))
    keep = image.data, other.data
    image.data = image.data.to(memory_format=torch.channels_last)
    other.data = other.data.to(memory_format=torch.channels_last)
    plan.lerp_(1.0)
    plans += [Plan([filled(9.0)], [filled(9.0)], backend=BACKEND) for _ in range(50)]
    graph.replay()
    assert keep[0].unique().tolist() == [0.5]
    assert image.unique().tolist() == [1.0]


def test_a_side_stream_can_be_captured_and_not_be_waited_for_later() -> None:
    averaged, source = filled(0.0), filled(1.0)
    needs("streams")
    plan, side = Plan([averaged], [source], backend=BACKEND), torch.cuda.Stream()

    def update() -> None:
        plan.lerp_(0.5, stream=side)
        source.add_(1.0)  # in the graph behind the update

    graph = captured(update)
    graph.replay()
    graph.replay()
    assert averaged.unique().tolist() == [1.25]
    plan.lerp_(0.0)  # nothing captured is left to be waited for
    with torch.cuda.stream(side):
        slow()
    plan.lerp_(0.0, stream=side)
    with pytest.raises(RuntimeError, match=r"call plan.wait\(\) before the capture"):
        captured(lambda: plan.lerp_(0.5))
    synchronize()


def test_weights_of_pairs_are_frozen_in_a_graph() -> None:
    averaged, source = [filled(0.0), filled(0.0, 5)], [filled(1.0), filled(1.0, 5)]
    plan = Plan(averaged, source, backend=BACKEND)
    graph = captured(lambda: plan.lerp_([0.5, 0.25]))
    plan.lerp_([1.0, 1.0])
    for tensor in averaged:
        tensor.zero_()
    graph.replay()
    assert [tensor.unique().tolist() for tensor in averaged] == [[0.5], [0.25]]


def test_captured_random_bits_go_on_with_a_step_on_the_device() -> None:
    averaged, source = filled(0.0, dtype=torch.bfloat16), filled(0.3)
    plan = Plan([averaged], [source], rounding="stochastic", backend=BACKEND)
    with pytest.raises(RuntimeError, match="the same random bits at every replay"):
        captured(lambda: plan.lerp_(0.01))
    synchronize()
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def update() -> None:
        plan.lerp_(0.01, step=step)
        step.add_(1)

    graph = captured(update)
    for _ in range(3):
        graph.replay()
    eager = filled(0.0, dtype=torch.bfloat16)
    plan = Plan([eager], [source], rounding="stochastic", backend=BACKEND)
    for _ in range(3):
        plan.lerp_(0.01)
    assert torch.equal(averaged, eager)


# ---- Streams and devices -------------------------------------------------------------------------


def slow() -> None:
    torch.cuda._sleep(50_000_000)  # some 30 ms


def test_updates_run_on_the_current_stream_and_leave_the_device() -> None:
    averaged, source = filled(0.0), filled(0.0)
    plan = Plan([averaged], [source], backend=BACKEND)
    needs("streams")
    stream, device = torch.cuda.Stream(), torch.cuda.current_device()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow()
        source.fill_(1.0)  # on another stream the update would see 0
        plan.lerp_(0.5)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.cuda.current_device() == device
    assert averaged.unique().tolist() == [0.5]


def test_a_side_stream_waits_and_is_waited_for() -> None:
    averaged, source = filled(0.0), filled(1.0)
    plan = Plan([averaged], [source], backend=BACKEND)
    needs("streams")
    side, third = torch.cuda.Stream(), torch.cuda.Stream()
    slow()
    source.fill_(3.0)  # behind the sleep: the update must see it
    plan.lerp_(0.5, stream=side)
    plan.wait()
    assert averaged.unique().tolist() == [1.5]
    with torch.cuda.stream(side):
        slow()
    plan.lerp_(0.5, stream=side)  # 2.25
    with torch.cuda.stream(third):
        plan.wait()
    plan.wait()  # this stream has to wait as well, though another one did
    source.fill_(100.0)  # the update must not see it
    assert averaged.unique().tolist() == [2.25]
    # The plan's own methods wait by themselves: averaged first, then swapped.
    with torch.cuda.stream(side):
        slow()
    plan.lerp_(0.5, stream=side)
    plan.swap_()
    assert averaged.unique().tolist() == [100.0]
    assert source.unique().tolist() == [51.125]


def test_what_is_freed_early_is_not_given_away_early() -> None:
    needs("streams")
    side = torch.cuda.Stream()
    averaged = filled(0.0)
    source = filled(1.0)
    weight = torch.tensor(0.5, device=DEVICE)
    plan = Plan([averaged], [source], backend=BACKEND)
    with torch.cuda.stream(side):
        slow()
    plan.lerp_(weight, stream=side)
    del source, weight
    plan.source.clear()
    keep = plan.averaged
    del plan  # and with it the last that held the source
    # On the current stream, at once, of both sizes.
    others = [filled(777.0) for _ in range(8)]
    others += [torch.full((), 777.0, device=DEVICE) for _ in range(200)]
    synchronize()
    assert keep[0].unique().tolist() == [0.5]
    assert all(other.unique().tolist() == [777.0] for other in others)


def test_memory_that_is_new_at_an_update_is_not_given_away_early() -> None:
    needs("streams")
    averaged, source, side = filled(0.0), filled(0.0), torch.cuda.Stream()
    plan = Plan([averaged], [source], backend=BACKEND)
    for value in (1.0, 2.0, 3.0):
        plan.lerp_(1.0, stream=side)
        source.data = filled(value)
        with torch.cuda.stream(side):
            slow()
        plan.lerp_(0.5, stream=side)
        source.data = torch.empty(MEGA, device=DEVICE)  # frees what the update will read
        others = [filled(777.0) for _ in range(8)]
        synchronize()
        assert others[0].unique().tolist() == [777.0]
        source.data = averaged.clone()
        plan.wait()
    assert averaged.unique().tolist() == [2.125]


def test_an_error_leaves_the_order_as_it_was() -> None:
    needs("streams")
    averaged, source, side = filled(0.0), filled(1.0), torch.cuda.Stream()
    plan = Plan([averaged], [source], backend=BACKEND)
    source.data = filled(1.0, 5)
    with pytest.raises(ValueError, match="was planned as"):
        plan.lerp_(0.5, stream=side)
    source.data = filled(1.0)
    plan.lerp_(0.5, stream=side)
    plan.wait()
    assert averaged.unique().tolist() == [0.5]


def test_tables_are_replaced_while_launches_are_under_way() -> None:
    averaged, source = filled(0.0), filled(0.0)
    plan = Plan([averaged], [source], backend=BACKEND)
    needs("streams")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    kept = []
    for step in range(12):
        kept.append(filled(float(step + 1)))
        source.data = kept[-1]
        if step % 4 == 0:
            slow()
        plan.lerp_(1.0, stream=streams[step % 2] if step % 3 else None)
    plan.wait()
    assert averaged.unique().tolist() == [12.0]


def two_gpus() -> None:
    needs("two devices")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def test_a_stream_of_another_device_is_refused() -> None:
    plan = Plan([filled(0.0)], [filled(1.0)], backend=BACKEND)
    two_gpus()
    other = torch.cuda.Stream(device=1)
    with pytest.raises(ValueError, match="make a Plan for each device"):
        plan.lerp_(0.5, stream=other)


def test_each_gpu_has_its_launch_and_the_callers_device_stays() -> None:
    two_gpus()
    averaged = [torch.zeros(MEGA, device=f"cuda:{k % 2}") for k in range(4)]
    source = [torch.ones(MEGA, device=f"cuda:{k % 2}") for k in range(4)]
    plan = Plan(averaged, source, backend=BACKEND)
    assert plan.launches == 2
    for current in (0, 1):
        with torch.cuda.device(current):
            plan.lerp_(0.5)
            assert torch.cuda.current_device() == current
    assert all(tensor.unique().tolist() == [0.75] for tensor in averaged)
