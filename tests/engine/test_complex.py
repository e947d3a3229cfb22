"""Complex tensors: the native kernel beside torch to the bit, and what is left to torch."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ema_fused
from ema_fused import AveragedWeights, ExponentialMovingAverage, Plan
from ema_fused.engine import backends
from ema_fused.engine.plan import ARITHMETICS
from tests import processes
from tests.engine import instruction_sets

COMPLEX = [torch.complex64, torch.complex128]
WEIGHTS = [0.0, 1e-3, 0.25, 0.4999, 0.5, 0.75, 1.0, -0.1, -0.7, 1.5]
HAS_KERNEL = backends.native() is not None and platform.machine() in ("x86_64", "AMD64")

pytestmark = pytest.mark.skipif(
    not HAS_KERNEL or backends.pinned(None) == "foreach",
    reason="complex tensors have a native kernel on x86-64 only",
)


@pytest.fixture(autouse=True)
def no_slow_path() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ema_fused.SlowPathWarning)
        yield


def waves(*shape: int, dtype: torch.dtype = torch.complex64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same_bits(found: Tensor, expected: Tensor, *, zeros_alike: bool = False) -> bool:
    """Bit for bit, but that any NaN is as good as another."""
    found, expected = (torch.view_as_real(tensor.resolve_conj()) for tensor in (found, expected))
    alike = found.isnan() & expected.isnan()
    if zeros_alike:
        alike |= found == expected
    integers = {8: torch.int64, 4: torch.int32}[found.itemsize]
    bits = [tensor.contiguous().view(integers) for tensor in (found, expected)]
    return bool(((bits[0] == bits[1]) | alike).all())


def by_torch(averaged: Tensor, source: Tensor, weight: float, arithmetic: str) -> Tensor:
    expected = averaged.clone()
    Plan([expected], [source], arithmetic=arithmetic, backend="foreach").lerp_(weight)
    return expected


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_lerp_equals_torch_to_the_bit(dtype: torch.dtype, weight: float) -> None:
    sizes = [1, 2, 3, 7, 8191, 8192, 8193, 20_001]
    source = [waves(n, dtype=dtype, seed=n) for n in sizes]
    averaged = [3 * waves(n, dtype=dtype, seed=-n) for n in sizes]
    expected = [torch.lerp(a, s, weight) for a, s in zip(averaged, source, strict=True)]
    lists = [a.clone() for a in averaged]
    torch._foreach_lerp_(lists, source, weight)
    plan = Plan(averaged, source)
    plan.lerp_(weight)
    assert plan.backends == ("cpu",)
    assert (plan.launches, plan.elements) == (1, sum(sizes))
    for found, one, other in zip(averaged, expected, lists, strict=True):
        assert same_bits(found, one)
        assert same_bits(found, other)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_every_arithmetic_equals_torch_to_the_bit(dtype: torch.dtype, arithmetic: str) -> None:
    for weight in WEIGHTS:
        averaged, source = waves(8195, dtype=dtype, seed=1), waves(8195, dtype=dtype, seed=2)
        expected = by_torch(averaged, source, weight, arithmetic)
        plan = Plan([averaged], [source], arithmetic=arithmetic)
        plan.lerp_(weight)
        assert plan.backends == ("cpu",)
        assert same_bits(averaged, expected), weight


SPECIAL = [0.0, -0.0, 1.0, -2.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38, -3e38]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_infinite_parts_make_nan_where_they_do_in_torch(
    dtype: torch.dtype, arithmetic: str
) -> None:
    parts = torch.tensor(SPECIAL, dtype=torch.float64)
    numbers = torch.view_as_complex(torch.cartesian_prod(parts, parts)).to(dtype)
    count = len(numbers)
    source = numbers.repeat(count)
    for weight in WEIGHTS:
        averaged = numbers.repeat_interleave(count)
        expected = by_torch(averaged, source, weight, arithmetic)
        Plan([averaged], [source], arithmetic=arithmetic).lerp_(weight)
        assert same_bits(averaged, expected, zeros_alike=True), weight


@pytest.mark.slow
def test_every_instruction_set_gives_the_bits_of_torch() -> None:
    code = (
        "import torch; from ema_fused import Plan; torch.manual_seed(0)\n"
        "for w in (0.001, 0.3, 0.7):\n"
        "    a, s = torch.randn(2, 1001, dtype=torch.complex64)\n"
        "    expected = torch.lerp(a, s, w); Plan([a], [s], backend='cpu').lerp_(w)\n"
        "    assert torch.equal(a, expected), w\n"
    )
    for capability in instruction_sets.available():
        processes.run("-c", code, ATEN_CPU_CAPABILITY=capability)


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_dense_layouts_copies_and_swaps(dtype: torch.dtype) -> None:
    averaged = [waves(5, 7, dtype=dtype).t(), waves(2, 3, 4, 5, dtype=dtype).permute(0, 2, 3, 1)]
    source = [3 * tensor for tensor in averaged]
    before = [tensor.clone() for tensor in averaged]
    models = [tensor.clone() for tensor in source]
    plan = Plan(averaged, source)
    assert plan.backends == ("cpu",)
    plan.swap_()
    assert all(map(torch.equal, averaged, models))
    assert all(map(torch.equal, source, before))
    plan.lerp_(0.3)
    expected = [torch.lerp(m, b, 0.3) for m, b in zip(models, before, strict=True)]
    assert all(map(same_bits, averaged, expected))
    plan.copy_()
    assert all(map(torch.equal, averaged, before))


def test_real_and_complex_pairs_share_a_launch_with_weights_of_their_own() -> None:
    makers = [torch.float32, torch.complex64, torch.bfloat16, torch.complex128, torch.float64]
    source = [torch.randn(9000).to(dtype) * (1 + i) for i, dtype in enumerate(makers)]
    averaged = [torch.randn(9000).to(dtype) for dtype in makers]
    source.append(torch.arange(9000))
    averaged.append(torch.zeros(9000, dtype=torch.int64))
    weights = [0.1, 0.3, 0.5, 0.7, 0.9, 0.0]
    expected = [
        torch.lerp(a, s, w) for a, s, w in zip(averaged[:-1], source, weights, strict=False)
    ]
    plan = Plan(averaged, source, only_copy=[False] * 5 + [True])
    plan.lerp_(weights)
    assert (plan.backends, plan.launches) == (("cpu",), 1)
    assert all(map(torch.equal, averaged, [*expected, source[-1]]))


def test_several_averages_of_one_source() -> None:
    source = [waves(8200, seed=1), torch.randn(8200)]
    start = [[waves(8200, seed=2), torch.randn(8200)] for _ in range(3)]
    weights = [0.001, 0.4, 0.8]
    expected = [
        [torch.lerp(a, s, w) for a, s in zip(one, source, strict=True)]
        for one, w in zip(start, weights, strict=True)
    ]
    Plan(start, source).lerp_([torch.tensor(w, dtype=torch.float64) for w in weights])
    for one, wanted in zip(start, expected, strict=True):
        assert all(map(torch.equal, one, wanted))


def test_random_bits_of_other_pairs_stay_what_they_are() -> None:
    def run(first: Tensor, second: Tensor, backend: str) -> Tensor:
        halves = torch.zeros(999, dtype=torch.bfloat16)
        plan = Plan(
            [first, halves], [second, torch.ones(999) / 3], rounding="stochastic", backend=backend
        )
        plan.lerp_(0.3)
        return halves

    expected = run(torch.zeros(5000), torch.ones(5000), "cpu")
    wave, other = waves(5000), waves(5000, seed=1)
    lerped = torch.lerp(wave, other, 0.3)
    assert torch.equal(run(wave, other, "cpu"), expected)
    assert torch.equal(wave, lerped)


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_the_squared_distance_counts_both_parts(dtype: torch.dtype) -> None:
    averaged = [waves(n, dtype=dtype, seed=n) for n in (1, 5, 9001)]
    source = [waves(n, dtype=dtype, seed=-n) for n in (1, 5, 9001)]
    pairs = zip(averaged, source, strict=True)
    expected = sum(float((s - a).to(torch.complex128).abs().square().sum()) for a, s in pairs)
    found = torch.zeros((), dtype=torch.float64)
    Plan(averaged, source, backend="cpu").lerp_(0.3, squared_distance=found)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_moved_memory_is_followed() -> None:
    parameter = nn.Parameter(waves(40))
    averaged = torch.zeros_like(parameter.data)
    plan = Plan([averaged], [parameter])
    parameter.data = waves(40, seed=5)
    plan.lerp_(0.25)
    assert torch.equal(averaged, torch.lerp(torch.zeros_like(averaged), waves(40, seed=5), 0.25))


REASONS: dict[str, Any] = {
    "the source has its conjugation pending": lambda: (waves(9), waves(9, seed=1).conj()),
    "the averaged tensor has its conjugation pending": lambda: (waves(9).conj(), waves(9, seed=1)),
    "the source has its negation pending": lambda: (waves(9), torch._neg_view(waves(9, seed=1))),
    "complex tensors have a kernel in complex64 and complex128": lambda: (
        waves(9).to(torch.complex32),
        waves(9, seed=1).to(torch.complex32),
    ),
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("reason", REASONS)
def test_the_rest_is_left_to_torch_with_the_reason(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    averaged, source = REASONS[reason]()
    expected = source.resolve_conj().resolve_neg().clone()
    with pytest.warns(ema_fused.SlowPathWarning, match=reason):
        plan = Plan([averaged], [source])
    assert plan.backends == ("foreach",)
    plan.copy_()
    assert averaged.tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_a_conjugation_in_the_same_memory_is_noticed() -> None:
    parameter = nn.Parameter(waves(40, seed=3))
    averaged = [waves(40), torch.zeros(4)]
    source = [parameter, torch.ones(4)]
    plan = Plan(averaged, source)
    plan.lerp_(0.25)
    expected = torch.lerp(averaged[0], parameter.detach().conj().resolve_conj(), 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ema_fused.SlowPathWarning)
        parameter.data = parameter.data.conj()
        plan.lerp_(0.25)
        assert torch.equal(averaged[0], expected)
        ema_fused.lerp_(averaged, source, 0.25)  # finds no plan of the memory as it was
    expected = torch.lerp(expected, parameter.detach().resolve_conj(), 0.25)
    assert torch.equal(averaged[0], expected)


def test_complex_and_real_have_no_average() -> None:
    for averaged, source in ((waves(3), torch.ones(3)), (torch.ones(3), waves(3))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ema_fused.SlowPathWarning)
            with pytest.raises(TypeError, match="have no average"):
                Plan([averaged], [source]).lerp_(0.5)


def test_overlaps_with_the_view_of_its_parts_are_named() -> None:
    wave = waves(9)
    with pytest.raises(ValueError, match="overlap"):
        Plan([wave, torch.view_as_real(wave)], [waves(9), torch.zeros(9, 2)])


class Spectral(nn.Module):
    """A layer of a neural operator: weights of Fourier modes."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(3, 4)
        self.modes = nn.Parameter(waves(4, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.lift(x).transpose(1, 2))[..., :8]
        mixed = torch.einsum("bim,iom->bom", spectrum, self.modes)
        return torch.fft.irfft(mixed, n=x.shape[1])


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_models_with_spectral_weights_are_native(kind: type[ExponentialMovingAverage]) -> None:
    torch.manual_seed(0)
    model = Spectral()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = kind(model, momentum=0.3)
    averaged.update_parameters(model)  # copies
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(4):
        model(torch.randn(2, 20, 3)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        for one, parameter in zip(expected, model.parameters(), strict=True):
            one.lerp_(parameter.detach(), 0.3)
    found = dict(averaged.module.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert all(map(torch.equal, [found[name] for name in names], expected))
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    with averaged.swapped(model):
        assert all(map(torch.equal, model.parameters(), expected))
    assert all(map(torch.equal, model.parameters(), trained))
