"""The squared distance between source and averages, measured by an update: on a GPU in
tests/gpu/test_gpu_distance.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ema_fused import Plan
from ema_fused.engine import across_devices, backends, reference
from ema_fused.engine.across_devices import MovedPart
from ema_fused.engine.parts import Task, Update
from ema_fused.engine.routing import split
from tests.threads import on_threads

AVERAGED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SOURCES = [*AVERAGED, torch.float8_e4m3fn, torch.float8_e5m2]
SIZES = [0, 1, 2, 15, 16, 17, 129, 4096, 8191, 8192, 8193, 20_001]
UPDATES = [
    *((arithmetic, "nearest") for arithmetic in ("lerp", "axpby", "delta", "products")),
    ("lerp", "stochastic"),
]
UNTOUCHED = -7.0


@pytest.fixture(autouse=True)
def warnings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is warned of once a process is still to be warned of in other tests."""
    monkeypatch.setattr(backends, "_warned", set())


def values(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def distance(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> float:
    """By the reference, in float64."""
    return sum(
        reference.squared_distance(wide(a).numpy(), wide(s).numpy())
        for a, s in zip(averaged, source, strict=True)
    )


def number(value: float = UNTOUCHED) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def near(expected: float) -> object:
    return pytest.approx(expected, rel=1e-6, abs=0.0)


@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=5),
    dtypes=st.lists(
        st.tuples(st.sampled_from(AVERAGED), st.sampled_from(SOURCES)), min_size=5, max_size=5
    ),
    update=st.sampled_from(UPDATES),
    averages=st.integers(1, 3),
    copied=st.integers(0, 5),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
def test_it_is_the_references_and_changes_no_average(
    backend: str,
    sizes: list[int],
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    update: tuple[str, str],
    averages: int,
    copied: int,
    threads: int,
    seed: int,
) -> None:
    pairs = [(n, *dtypes[i]) for i, n in enumerate(sizes)]
    source = [values(n, dtype, seed + i) for i, (n, _, dtype) in enumerate(pairs)]
    averaged = [
        [values(n, dtype, seed - 1 - i - 5 * k) for i, (n, dtype, _) in enumerate(pairs)]
        for k in range(averages)
    ]
    alone = [[tensor.clone() for tensor in one] for one in averaged]
    only_copy = [i == copied for i in range(len(pairs))]
    kept = [i for i in range(len(pairs)) if i != copied]
    expected = [distance([one[i] for i in kept], [source[i] for i in kept]) for one in averaged]
    arithmetic, rounding = update

    def plan_of(lists: list[list[Tensor]]) -> Plan:
        return Plan(
            lists,
            source,
            arithmetic=arithmetic,
            rounding=rounding,
            only_copy=only_copy,
            backend=backend,
        )

    found = torch.full((averages,) if averages > 1 else (), UNTOUCHED, dtype=torch.float64)
    with on_threads(threads):
        plan_of(averaged).lerp_(0.3, squared_distance=found)
    assert found.view(-1).tolist() == [near(value) for value in expected]
    plan_of(alone).lerp_(0.3)
    for one, other in zip(averaged, alone, strict=True):
        for measured, unmeasured in zip(one, other, strict=True):
            assert measured.view(torch.uint8).tolist() == unmeasured.view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    sizes = [*SIZES, 3, 300_007, 100_003]
    source = [values(n, dtype, i) for i, n in enumerate(sizes)]
    found = []
    for threads in (1, 2, 3, 2):
        averaged = [values(n, dtype, 99 + i) for i, n in enumerate(sizes)]
        into = number()
        with on_threads(threads):
            Plan(averaged, source, backend=backend).lerp_(0.3, squared_distance=into)
        found.append(into.item())
    averaged = [values(n, dtype, 99 + i) for i, n in enumerate(sizes)]
    assert found[0] == near(distance(averaged, source))
    assert found == [found[0]] * 4


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "sliced": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_every_layout_is_measured(layout: str, other: str) -> None:
    averaged = LAYOUTS[layout](values(6 * 3 * 5 * 7, torch.float32, 1).view(6, 3, 5, 7))
    source = LAYOUTS[other](values(6 * 3 * 5 * 7, torch.float32, 2).view(6, 3, 5, 7))
    expected, found = distance([averaged], [source]), number()
    Plan([averaged], [source]).lerp_(0.3, squared_distance=found)
    assert found.item() == near(expected)


def test_it_is_measured_at_every_update_and_the_steps_count_on(backend: str) -> None:
    averaged, source = torch.zeros(3), torch.ones(3)
    plan, found = Plan([averaged], [source], backend=backend), number()
    for expected in (3.0, 0.75, 0.1875):
        plan.lerp_(0.5, squared_distance=found)
        assert found.item() == expected
    source.data = torch.full((3,), 2.875)  # averaged is at 0.875
    plan.lerp_([0.5], squared_distance=found)
    assert found.item() == 12.0
    assert plan.step == 4


def test_tied_pairs_count_once_empty_ones_and_copies_nothing(backend: str) -> None:
    averaged, source = torch.zeros(5), torch.ones(5)
    same, counts = torch.ones(7), torch.tensor([9, 9])
    empty, flags = torch.zeros(0, 3), torch.tensor([True])
    plan = Plan(
        [averaged, averaged, same, empty, counts, flags, torch.zeros(4)],
        [source, source, same, empty.clone(), counts * 2, ~flags, torch.full((4,), 50.0)],
        only_copy=[False, False, False, False, True, True, True],
        backend=backend,
    )
    found = number()
    plan.lerp_(0.5, squared_distance=found)
    assert found.item() == 5.0
    assert averaged.tolist() == [0.5] * 5


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_nothing_is_at_distance_zero(backend: str, pairs: int) -> None:
    averaged = [torch.zeros(0) for _ in range(pairs)]
    found = number()
    Plan(averaged, [t.clone() for t in averaged], backend=backend).lerp_(
        0.5, squared_distance=found
    )
    assert found.item() == 0.0


def test_each_average_has_its_own(backend: str) -> None:
    averaged = [[torch.zeros(5), torch.ones(9000)], [torch.ones(5), torch.zeros(9000).double()]]
    source = [torch.ones(5), torch.full((9000,), 3.0)]
    found = torch.full((2, 2), UNTOUCHED, dtype=torch.float64)
    plan = Plan(averaged, source, backend=backend)
    plan.lerp_([0.5, 1.0], squared_distance=found[:, 0])  # every other number in memory
    assert found[:, 0].tolist() == [36_005.0, 81_000.0]
    plan.lerp_(0.0, squared_distance=found[1])
    assert found.tolist() == [[36_005.0, UNTOUCHED], [9_001.25, 0.0]]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32_are_right(backend: str, scale: float) -> None:
    averaged, source = [values(5000, torch.float32, 1) * scale], [torch.zeros(5000)]
    expected, found = distance(averaged, source), number()
    Plan(averaged, source, backend=backend).lerp_(0.5, squared_distance=found)
    assert 0.0 < expected < float("inf")
    assert found.item() == near(expected)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(backend: str, value: float) -> None:
    source = torch.ones(9000)
    source[8500] = value
    found = number()
    Plan([torch.zeros(9000)], [source], backend=backend).lerp_(0.5, squared_distance=found)
    assert str(found.item()) == str(value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_parts_add_up_and_complex_numbers_count_both_sides(dtype: torch.dtype) -> None:
    averaged = [values(2000, torch.float32, 1), torch.randn(300, dtype=dtype)]
    source = [values(2000, torch.float32, 2), torch.randn(300, dtype=dtype)]
    averaged.append(values(500, torch.bfloat16, 3))
    source.append(values(500, torch.bfloat16, 4))
    expected, found = distance(averaged, source), number()
    plan = Plan(averaged, source, arithmetic="axpby")
    plan.lerp_(0.3, squared_distance=found)
    assert found.item() == near(expected)
    if backends.native() is not None:
        assert plan.backends == ("cpu", "foreach")


@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_pairs_of_two_devices_are_measured(
    group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CPU tensors on both sides."""
    monkeypatch.setattr(across_devices, "_GROUP_BYTES", group_bytes)
    sizes = [100, 2, 0, 9000]
    tasks = [
        Task(i, values(n, torch.float32, i), values(n, torch.bfloat16, -i), i == 1, i % 2, i)
        for i, n in enumerate(sizes)
    ]
    tasks.append(tasks[3])
    expected = [distance([tasks[i].averaged], [tasks[i].source]) for i in (0, 3)]
    distances: list[Tensor] = []
    split_here = functools.partial(split, arithmetic="lerp", backend=None, names=None)
    part = MovedPart(tasks, "lerp", split_here)
    assert part.average(Update([0.5, 0.25], [], distances=distances))
    assert torch.stack(distances).sum(dim=0).tolist() == [near(value) for value in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_an_update_that_does_nothing_leaves_it_alone(backend: str, dtype: torch.dtype) -> None:
    averaged, source = [torch.zeros(3)], [torch.ones(3)]
    if backend == "foreach":
        averaged.append(torch.zeros(2) * 1j)
        source.append(torch.ones(2) * 1j)
    plan, found = Plan(averaged, source, backend=backend), number()
    flag = torch.ones(1, dtype=dtype)
    plan.lerp_(0.5, found_inf=flag, squared_distance=found)
    assert found.item() == UNTOUCHED
    plan.lerp_(0.5, found_inf=flag.zero_(), squared_distance=found)
    assert found.item() == (5.0 if backend == "foreach" else 3.0)
    flag.fill_(1)
    plan.lerp_(0.5, found_inf=flag, squared_distance=found)
    assert found.item() == (5.0 if backend == "foreach" else 3.0)


def test_a_tensor_made_in_inference_mode_is_written(backend: str) -> None:
    with torch.inference_mode():
        inference = number()
    learned = torch.nn.Parameter(number())
    plan = Plan([torch.zeros(3)], [torch.ones(3)], backend=backend)
    plan.lerp_(0.0, squared_distance=inference)
    plan.lerp_(0.0, squared_distance=learned)
    assert (inference.item(), learned.item()) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (0.0, TypeError, r"squared_distance is 0\.0; a float64 tensor of shape \(\) is expected"),
        (torch.zeros(()), TypeError, r"is float32 of shape \(\); a float64 tensor"),
        (torch.zeros((), dtype=torch.int64), TypeError, r"is int64 of shape"),
        (torch.zeros(1, dtype=torch.float64), ValueError, r"has shape \(1,\); .* of shape \(\)"),
        (torch.zeros((), dtype=torch.float64, device="meta"), ValueError, "no memory of its own"),
    ],
    ids=str,
)
def test_what_it_can_not_be_written_to_is_refused(
    backend: str, wrong: Tensor, error: type[Exception], message: str
) -> None:
    averaged = torch.zeros(3)
    plan = Plan([averaged], [torch.ones(3)], backend=backend)
    with pytest.raises(error, match=message):
        plan.lerp_(0.5, squared_distance=wrong)
    assert averaged.tolist() == [0.0] * 3
    assert plan.step == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (number(), r"has shape \(\); a float64 tensor of shape \(2,\) is expected"),
        (torch.zeros(3, dtype=torch.float64), r"has shape \(3,\); .* of shape \(2,\)"),
        (number().expand(2), "no memory of its own for each number"),
        (torch.zeros(2, dtype=torch.float64).to_sparse(), "no memory of its own for each number"),
    ],
    ids=str,
)
def test_several_averages_want_as_many_numbers(backend: str, wrong: Tensor, message: str) -> None:
    averaged = [[torch.zeros(3)], [torch.zeros(3)]]
    plan = Plan(averaged, [torch.ones(3)], backend=backend)
    with pytest.raises(ValueError, match=message):
        plan.lerp_(0.5, squared_distance=wrong)
    assert not any(one[0].any() for one in averaged)


def test_an_update_that_raises_leaves_it_alone(backend: str) -> None:
    averaged, source = [torch.zeros(3)], [torch.ones(3)]
    plan, found = Plan(averaged, source, backend=backend), number()
    source[0].data = torch.ones(4)
    with pytest.raises(ValueError, match="was planned as float32"):
        plan.lerp_(0.5, squared_distance=found)
    assert found.item() == UNTOUCHED


def test_the_extension_refuses_room_for_too_few_numbers() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the extension is not built")
    tensors = [torch.zeros(3), torch.zeros(3)], [torch.ones(3), torch.ones(3)]
    part = native.Plan(*tensors, [(False, 0, 0), (False, 1, 1)], native.Arithmetic.LERP)
    assert part.partials == 1
    sums = torch.full((3,), UNTOUCHED, dtype=torch.float64)
    for averages, count in ((1, 1), (2, 0)):
        partials = (sums.data_ptr(), averages, count)
        with pytest.raises(ValueError, match="a sum for every average and part is needed"):
            part.run_with(native.Operation.AVERAGE, 0.5, [], [], 0, 0, 0, 0, partials)
    assert not tensors[0][0].any()
    partials = (sums.data_ptr(), 2, 1)
    assert part.run_with(native.Operation.AVERAGE, 0.5, [], [], 0, 0, 0, 0, partials)
    assert sums.tolist() == [3.0, 3.0, UNTOUCHED]
