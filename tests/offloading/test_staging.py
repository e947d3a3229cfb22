"""Averages updated piece by piece through staging buffers: their bits, and what may change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import Plan
from ema_fused.engine import backends
from ema_fused.offloading.offloaded_plan import OffloadedPlan, host_memory

FOREACH = "ignore:.*foreach functions:ema_fused.SlowPathWarning"

needs_native = pytest.mark.skipif(backends.native() is None, reason="nothing is compiled")


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To the bit, by value where there are gaps in memory."""
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.contiguous().view(-1), b.contiguous().view(-1)) for a, b in pairs)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype) if dtype.is_floating_point else (values * 100).to(dtype)


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    shapes = [(0,), (1,), (), (7, 3), (129,), (5000,), (0, 4), (64,), (33, 65), (257,)]
    plain = [random(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    image = random((4, 3, 9, 11), dtype, seed + 99).to(memory_format=torch.channels_last)
    return [*plain, image, random((3001,), dtype, seed + 98)[1:]]


def clones(sources: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in sources]


# ---- Bits ----------------------------------------------------------------------------------------

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float16),
    (torch.float32, torch.float8_e4m3fn),
]


@pytest.mark.filterwarnings(FOREACH)
@pytest.mark.parametrize("staging_bytes", [1024, 5000, 1 << 20])
@pytest.mark.parametrize("mode", ["lerp", "axpby", "delta", "products", "stochastic"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_bits_are_those_of_a_plan(
    dtypes: tuple[torch.dtype, torch.dtype], mode: str, staging_bytes: int, backend: str
) -> None:
    averaged, source = tensors(dtypes[0], 1), tensors(dtypes[1], 1000)
    expected = clones(averaged)
    arithmetic, rounding = ("lerp", mode) if mode == "stochastic" else (mode, "nearest")
    only_copy = [i % 5 == 4 for i in range(len(source))]
    numbers = [3 * i + 1 for i in range(len(source))]
    options: dict[str, Any] = {
        "arithmetic": arithmetic,
        "only_copy": only_copy,
        # Of no backend's choice: the default one too.
        "backend": None if backend == "cpu" else backend,
        "rounding": rounding,
        "numbers": numbers,
    }
    ours = OffloadedPlan(averaged, source, staging_bytes=staging_bytes, **options)
    theirs = Plan(expected, source, **options)
    for step, weight in enumerate((0.1, 0.7, 0.001, 1.0, 0.25)):
        ours.lerp_(weight, seed=5, step=step + 7)
        ours.flush()
        theirs.load_state_dict({"seed": 5, "step": step + 7})
        theirs.lerp_(weight)
        assert equal(averaged, expected)
        for tensor in source:
            values = tensor.double() * 0.5
            tensor.copy_(values.flip(0) if tensor.dim() else values)
    ours.copy_()
    ours.flush()
    theirs.copy_()
    assert equal(averaged, expected)


@pytest.mark.filterwarnings(FOREACH)
@pytest.mark.parametrize("arithmetic", ["lerp", "axpby", "delta"])
def test_bits_of_tensors_that_several_threads_share(arithmetic: str) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    averaged = [random((200_003,), dtype, i) for i, dtype in enumerate(dtypes)]
    source = [random((200_003,), dtype, 9 - i) for i, dtype in enumerate(dtypes)]
    expected = clones(averaged)
    plan = OffloadedPlan(averaged, source, arithmetic=arithmetic, staging_bytes=70_000)
    for weight in (0.3, 0.01):
        plan.lerp_(weight)
        plan.flush()
        Plan(expected, source, arithmetic=arithmetic).lerp_(weight)
    assert equal(averaged, expected)


@needs_native
def test_a_buffer_is_no_larger_than_asked_where_tensors_can_be_cut() -> None:
    averaged, source = [torch.zeros(100_003), torch.zeros(9)], [torch.ones(100_003), torch.ones(9)]
    plan = OffloadedPlan(averaged, source, staging_bytes=4096)
    assert plan.staged_bytes <= 4096
    assert len(plan._pieces) >= 100_003 * 4 // 4096
    plan.lerp_(0.5)
    plan.flush()
    assert averaged[0].unique().tolist() == [0.5]
    assert OffloadedPlan([torch.zeros(9)], [torch.ones(9)]).staged_bytes == 36
    halves = [torch.zeros(100_003).bfloat16()]
    whole = OffloadedPlan(halves, source[:1], staging_bytes=4096, rounding="stochastic")
    assert whole.staged_bytes == 100_003 * 4


@pytest.mark.filterwarnings(FOREACH)
def test_layouts_integers_and_bits_that_wait_to_be_flipped(backend: str) -> None:
    grid = torch.arange(12_000.0).view(100, 120)
    source = [
        grid.t(),  # not the averaged tensor's layout
        grid[:, ::3],  # gaps
        torch.tensor(3.0).expand(700),
        random((700,), torch.complex64, 1),
        random((700,), torch.complex64, 2).conj(),
        random((700,), torch.complex64, 3).conj().imag,  # its negation is pending
        random((5000,), torch.int64, 4),
        torch.arange(3000) % 3 == 0,
    ]
    averaged = [torch.ones(s.shape, dtype=s.dtype) for s in source]
    averaged.append(torch.ones(100, 120).t())
    source.append(grid.t())
    only_copy = [not s.is_floating_point() and not s.is_complex() for s in source]
    expected = clones(averaged)
    pinned = None if backend == "cpu" else backend
    plan = OffloadedPlan(averaged, source, only_copy=only_copy, staging_bytes=1024, backend=pinned)
    for weight in (0.3, 0.6):
        plan.lerp_(weight)
        plan.flush()
        Plan(expected, source, only_copy=only_copy, backend=pinned).lerp_(weight)
    assert equal(averaged, expected)


def test_tied_and_shared_tensors_are_updated_as_by_a_plan(backend: str) -> None:
    first, shared = random((4000,), torch.float32, 1), random((300,), torch.float32, 3)
    source = random((4000,), torch.float32, 2)
    averaged = [first, first, shared, first.view(40, 100)]
    sources = [source, source, shared, source.view(40, 100)]
    expected, kept = first.clone(), shared.clone()
    plan = OffloadedPlan(
        averaged, sources, arithmetic="products", staging_bytes=1024, backend=backend
    )
    plan.lerp_(0.3)
    plan.flush()
    Plan([expected], [source], arithmetic="products", backend=backend).lerp_(0.3)
    if backend == "cpu":  # foreach knows tied tensors by their shapes too
        assert torch.equal(first, expected)
    assert torch.equal(shared, kept)


def test_parameters_need_no_gradient_to_be_read() -> None:
    model = nn.Linear(30, 20)
    averaged = [host_memory(p, torch.float64).zero_() for p in model.parameters()]
    plan = OffloadedPlan(averaged, list(model.parameters()))
    plan.lerp_(1.0)
    plan.flush()
    assert equal(averaged, [p.detach().double() for p in model.parameters()])


def test_host_memory_is_like_its_tensor() -> None:
    image = nn.Parameter(torch.zeros(2, 3, 5, 7).to(memory_format=torch.channels_last))
    memory = host_memory(image, torch.float32)
    assert type(memory) is Tensor
    assert (memory.shape, memory.stride()) == (image.shape, image.stride())
    assert memory.device.type == "cpu"
    assert not memory.requires_grad
    assert memory.is_pinned() == torch.cuda.is_available()
    assert host_memory(image.double()).dtype == torch.float64


# ---- What changes between updates ----------------------------------------------------------------


@pytest.mark.filterwarnings(FOREACH)
@pytest.mark.parametrize("side", ["source", "averaged"])
def test_replaced_storage_is_followed(side: str, backend: str) -> None:
    averaged, source = [torch.zeros(40, 60), torch.zeros(5)], [torch.ones(40, 60), torch.ones(5)]
    plan = OffloadedPlan(averaged, source, staging_bytes=1024, backend=backend)
    plan.lerp_(0.5)
    plan.flush()
    changing = (source if side == "source" else averaged)[0]
    old = changing.data
    for value in (3.0, 4.0):
        changing.data = torch.full((40, 60), value)
        plan.lerp_(0.5)
        plan.flush()
        expected = torch.lerp(torch.tensor(0.5 if value == 3 else 1.75), torch.tensor(value), 0.5)
        if side == "averaged":
            expected = torch.lerp(torch.tensor(value), torch.tensor(1.0), 0.5)
        assert averaged[0].unique().tolist() == [float(expected)]
    assert old.unique().tolist() == [1.0 if side == "source" else 0.5]
    # The same memory in another order.
    served = None if backend == "cpu" else backend
    square = [torch.zeros(50, 50)], [torch.arange(2500.0).view(50, 50)]
    plan = OffloadedPlan(*square, staging_bytes=1024, backend=served)
    square[1][0].data = square[1][0].data.t()
    plan.lerp_(1.0)
    plan.flush()
    assert torch.equal(*square[0], square[1][0])


def test_the_old_buffers_go_before_there_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged, source = [torch.zeros(3000)], [torch.ones(3000)]
    plan = OffloadedPlan(averaged, source, staging_bytes=1024)
    plan.lerp_(0.5)
    plan.flush()
    plan.copy_()  # the last update is one that nobody has waited for
    assert plan._update is not None
    assert plan._update.done.wait(60)
    old = [weakref.ref(piece) for piece in plan._pieces]
    living = []

    def looked_at(*arguments: Any) -> Tensor:
        living.append([piece for piece in old if piece() is not None])
        return host_memory(*arguments)

    monkeypatch.setattr("ema_fused.offloading.staging.host_memory", looked_at)
    source[0].data = torch.ones(3000)
    plan.lerp_(0.5)
    plan.flush()
    assert len(old) > 2
    assert living == [[], []]


def test_a_changed_kind_is_refused_before_anything_is_updated() -> None:
    averaged = [torch.zeros(1000), torch.zeros(1000)]
    source = [torch.ones(1000), torch.ones(1000)]
    plan = OffloadedPlan(averaged, source, names=["a.weight", "b.weight"])
    for other, found in ((torch.ones(1000).half(), "float16"), (torch.ones(999), r"\(999,\)")):
        source[1].data = other
        for call in (lambda: plan.lerp_(0.5), plan.copy_):
            match = rf"'b.weight': the source was planned as float32 of shape \(1000,\).*{found}"
            with pytest.raises(ValueError, match=match):
                call()
    plan.flush()
    assert not averaged[0].any()
    source[1].data = torch.ones(1000)
    plan.lerp_(0.5)
    plan.flush()
    assert averaged[1].unique().tolist() == [0.5]


def test_bad_arguments_are_refused() -> None:
    one, other = [torch.zeros(10)], [torch.ones(10)]
    meta = [torch.ones(10, device="meta")]
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "at least 1024", lambda: OffloadedPlan(one, other, staging_bytes=1023)),
        (TypeError, "staging_bytes", lambda: OffloadedPlan(one, other, staging_bytes=2e6 + 0.5)),  # type: ignore[arg-type]
        (ValueError, "must pair up", lambda: OffloadedPlan(one, [])),
        (ValueError, "must be equal", lambda: OffloadedPlan(one, [torch.ones(9)])),
        (ValueError, "meta device", lambda: OffloadedPlan(one, meta)),
        (ValueError, "overlap", lambda: OffloadedPlan(one * 2, [*other, torch.ones(10)])),
        (TypeError, "one average", lambda: OffloadedPlan([one, [torch.ones(10)]], other)),  # type: ignore[list-item]
        (ValueError, "arithmetic", lambda: OffloadedPlan(one, other, arithmetic="mean")),
        (ValueError, "rounding", lambda: OffloadedPlan(one, other, rounding="up")),
        (TypeError, "one number", lambda: OffloadedPlan(one, other).lerp_([0.5])),  # type: ignore[arg-type]
        (TypeError, "weight", lambda: OffloadedPlan(one, other).lerp_("half")),  # type: ignore[arg-type]
        (ValueError, "seed", lambda: OffloadedPlan(one, other).lerp_(0.5, seed=-1)),
        (TypeError, "step", lambda: OffloadedPlan(one, other).lerp_(0.5, step=0.5)),  # type: ignore[arg-type]
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()
    integers = OffloadedPlan([torch.ones(4).long()], [torch.zeros(4).long()], names=["count"])
    with pytest.raises(TypeError, match=r"'count'.*have no average"):
        integers.lerp_(0.5)
    integers.copy_()
    integers.flush()
    assert not integers.averaged[0].any()
    assert not one[0].any()
