"""Stochastic rounding: the bits, their independence of how they are computed, and what they do."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ema_fused
from ema_fused import ExponentialMovingAverage, Plan, StochasticWeightAverage
from ema_fused.engine import backends
from ema_fused.engine.rounding import philox, random_halves, round_stochastically
from tests.threads import on_threads

HALVES = [torch.bfloat16, torch.float16]
SOURCES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
SIZES = [0, 1, 7, 8, 9, 2047, 2049, 8191, 8192, 8193, 20_001]

needs_native = pytest.mark.skipif(backends.native() is None, reason="the extension is not built")


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(n, generator=generator).to(dtype) for n in SIZES]
    image = torch.randn(3, 5, 7, 2, generator=generator).to(dtype)
    return [*flat, image.to(memory_format=torch.channels_last), flat[-1][3:1000], flat[-2][:0]]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def test_philox_gives_the_answers_its_authors_published() -> None:
    ones = 0xFFFFFFFF
    cases = [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, seed, expected in cases:
        words = philox([torch.tensor([word]) for word in counter], seed)
        assert [int(word) for word in words] == expected


@needs_native
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
@pytest.mark.parametrize("averaged_dtype", HALVES, ids=str)
def test_the_kernel_and_torchs_functions_give_the_same_bits(
    averaged_dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    on_cpu, source = tensors(averaged_dtype, 1)[:-2], tensors(source_dtype, 2)[:-2]
    special = [math.nan, math.inf, -math.inf, 65504.0, 1e-7, -3e-8, 0.0, -0.0]
    on_cpu[-2][:8] = torch.tensor(special).to(averaged_dtype)
    on_foreach = [tensor.clone() for tensor in on_cpu]
    plans = [
        Plan(averaged, source, rounding="stochastic", seed=2**40 + 7, backend=backend)
        for averaged, backend in ((on_cpu, "cpu"), (on_foreach, "foreach"))
    ]
    for weight in (0.001, 0.7, 0.3):
        for plan in plans:
            plan.lerp_(weight)
    assert same_bits(on_cpu, on_foreach)


@needs_native
def test_bits_depend_on_neither_threads_nor_the_way_a_tensor_is_cut() -> None:
    results = []
    for count in (1, 2, 3):
        averaged, source = torch.zeros(300_001).bfloat16(), torch.full((300_001,), 0.3)
        with on_threads(count):
            Plan([averaged], [source], rounding="stochastic", backend="cpu").lerp_(0.01)
        results.append(averaged)
    assert same_bits(results[:1] * 2, results[1:])
    # The same elements in memory that is aligned otherwise.
    memory = torch.zeros(300_004).bfloat16()
    for shift in (1, 3):
        view = memory[shift : shift + 300_001].zero_()
        Plan([view], [source], rounding="stochastic", backend="cpu").lerp_(0.01)
        assert torch.equal(view, results[0])


def test_bits_depend_on_the_seed_the_step_the_pair_and_the_element(backend: str) -> None:
    def averaged(seed: int, step: int, pairs: int = 1) -> Tensor:
        values = [torch.zeros(4096).bfloat16() for _ in range(pairs)]
        sources = [torch.full((4096,), 0.3)] * pairs
        plan = Plan(values, sources, rounding="stochastic", seed=seed, backend=backend)
        plan.lerp_(0.01, step=step)
        return values[-1]

    first = averaged(0, 0)
    assert torch.equal(first, averaged(0, 0))
    for step in (2**32, 2**70, -(2**32)):  # modulo 2**32
        assert torch.equal(first, averaged(0, step))
    for other in (averaged(1, 0), averaged(2**32, 0), averaged(0, 1), averaged(0, 0, pairs=2)):
        agree = (other == first).double().mean().item()
        assert 0.4 < agree < 0.8  # as chance has it: p**2 + (1 - p)**2, p the odds to round up
    # No two elements of a random block go together.
    eights = (first == first.max()).view(-1, 8).double()
    correlation = torch.corrcoef(eights.T) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(len(eights))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_unbiased_and_to_a_neighbour(dtype: torch.dtype, backend: str) -> None:
    count = 200_000
    generator = torch.Generator().manual_seed(3)
    for scale in (1.0, 2.0**-16):  # the second: subnormal in float16
        source = torch.rand(count, generator=generator) * scale
        averaged = torch.zeros(count, dtype=dtype)
        Plan([averaged], [source], rounding="stochastic", seed=5, backend=backend).lerp_(1.0)
        error = averaged.double() - source.double()
        nearest = (source.to(dtype).double() - source.double()).abs()
        spacing = torch.finfo(dtype).eps * torch.maximum(
            2.0 ** source.double().log2().floor(), torch.tensor(torch.finfo(dtype).tiny)
        )
        assert (error.abs() < spacing).all()
        assert (error.abs() >= nearest).all()
        # The mean error of n elements, in standard deviations of it: 4 happen once in 16,000.
        deviation = error.std() / math.sqrt(count)
        assert error.mean().abs() < 4 * deviation
        # Nearest rounding is off by less, so the comparison above is not an empty one.
        assert error.abs().mean() > nearest.mean()


def test_where_nearest_stands_still_stochastic_arrives(backend: str) -> None:
    elements, steps, momentum = 512, 10_000, 1e-3
    source = [torch.full((elements,), 1.5)]
    still, moving = torch.ones(elements).bfloat16(), torch.ones(elements).bfloat16()
    nearest = Plan([still], source, backend=backend)
    stochastic = Plan([moving], source, rounding="stochastic", backend=backend)
    if backend == "foreach":
        steps = 1000  # torch's functions take a while
    exact = 1.0
    for step in range(1, steps + 1):
        nearest.lerp_(momentum)
        stochastic.lerp_(momentum)
        exact += momentum * (1.5 - exact)
        if step in (500, 1000, steps):
            assert still.unique().tolist() == [1.0]
            assert moving.double().mean().item() == pytest.approx(exact, rel=0.02)
            assert moving.double().mean().item() > 1.15


def test_a_plan_resumes_to_the_bit(backend: str) -> None:
    def fresh() -> tuple[list[Tensor], Plan]:
        averaged = tensors(torch.bfloat16, 4)
        source = tensors(torch.float32, 5)
        return averaged, Plan(averaged[:-2], source[:-2], rounding="stochastic", backend=backend)

    straight, plan = fresh()
    plan.load_state_dict({"seed": 9, "step": 0})
    for _ in range(5):
        plan.lerp_(0.01)
    resumed, plan = fresh()
    plan.load_state_dict({"seed": 9, "step": 0})
    for _ in range(2):
        plan.lerp_(0.01)
    state = plan.state_dict()
    assert state == {"seed": 9, "step": 2}
    plan = Plan(
        resumed[:-2], tensors(torch.float32, 5)[:-2], rounding="stochastic", backend=backend
    )
    plan.load_state_dict(state)
    plan = copy.copy(plan)  # carries its state too
    for _ in range(3):
        plan.lerp_(0.01)
    assert same_bits(straight, resumed)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 17), nn.BatchNorm1d(17), nn.Linear(17, 5))
    return network.to(torch.bfloat16)


def train(model: nn.Module, average: nn.Module, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        average.update_parameters(model)


@pytest.mark.parametrize("cls", [ExponentialMovingAverage, StochasticWeightAverage])
def test_an_averaged_model_resumes_to_the_bit(
    cls: type[ema_fused.BaseAveragedModel], tmp_path: Path, backend: str
) -> None:
    straight_model, resumed_model = small_model(), small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither a slow path nor lost changes to be told of
        straight = cls(straight_model, interval=2, rounding="stochastic", seed=11, backend=backend)
        train(straight_model, straight, 0, 12)
        half = cls(resumed_model, interval=2, rounding="stochastic", seed=11, backend=backend)
        train(resumed_model, half, 0, 7)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert int(state["rounding_seed"]) == 11
    resumed = cls(resumed_model, interval=2, rounding="stochastic", backend=backend)
    resumed.load_state_dict(state)
    train(resumed_model, resumed, 7, 12)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    other = cls(straight_model, rounding="stochastic", seed=12, backend=backend)
    train(straight_model, other, 0, 12)
    assert not all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters(), strict=True)
    )


def test_checkpoints_without_a_seed_are_loaded(backend: str) -> None:
    model = small_model()
    plain = ExponentialMovingAverage(model, backend=backend)
    assert set(plain.state_dict()) == {"steps"} | {f"module.{n}" for n in model.state_dict()}
    stochastic = ExponentialMovingAverage(model, rounding="stochastic", seed=3, backend=backend)
    stochastic.load_state_dict(plain.state_dict())
    assert int(stochastic.rounding_seed) == 3
    saved = stochastic.state_dict()
    plain.load_state_dict(saved)
    assert "rounding_seed" in saved  # read, and left as it was


def test_random_bits_do_not_depend_on_what_is_shared(backend: str) -> None:
    results = []
    for share_frozen in (False, True):
        model = small_model()
        model[0].weight.requires_grad_(False)
        average = ExponentialMovingAverage(
            model, momentum=0.01, rounding="stochastic", share_frozen=share_frozen, backend=backend
        )
        for step in range(4):
            with torch.no_grad():
                for parameter in model[2].parameters():
                    parameter.add_(0.1 * (step + 1))
            average.update_parameters(model)
        results.append(list(average.module[2].parameters()))
    assert same_bits(*results)


def test_numbers_stand_in_for_the_places_in_the_lists(backend: str) -> None:
    def averaged(places: int, numbers: list[int] | None) -> list[Tensor]:
        values = [torch.zeros(512).bfloat16() for _ in range(places)]
        sources = [torch.full((512,), 0.3)] * places
        Plan(values, sources, rounding="stochastic", numbers=numbers, backend=backend).lerp_(0.01)
        return values

    three = averaged(3, None)
    assert same_bits(averaged(2, [2, 0]), [three[2], three[0]])
    assert not torch.equal(three[0], three[1])
    with pytest.raises(ValueError, match="numbers has 1 items for 2 pairs"):
        averaged(2, [0])


def test_a_capture_is_refused_unless_the_step_can_advance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    halves = Plan([torch.zeros(3).bfloat16()], [torch.ones(3)], rounding="stochastic")
    for step in (None, 3, torch.tensor(3)):
        with pytest.raises(RuntimeError, match="the same random bits at every replay"):
            halves.lerp_(0.5, step=step)
    assert halves.step == 0
    # What draws no bits repeats none.
    Plan([torch.zeros(3)], [torch.ones(3)], rounding="stochastic").lerp_(0.5)
    Plan([torch.zeros(3).bfloat16()], [torch.ones(3)]).lerp_(0.5)


def test_wider_averages_are_rounded_to_nearest_as_ever(backend: str) -> None:
    averaged = [torch.randn(100), torch.randn(100, dtype=torch.float64)]
    source = [torch.randn(100).bfloat16(), torch.randn(100)]
    expected = [tensor.clone() for tensor in averaged]
    Plan(averaged, source, rounding="stochastic", backend=backend).lerp_(0.3)
    Plan(expected, source, backend=backend).lerp_(0.3)
    assert all(torch.equal(a, e) for a, e in zip(averaged, expected, strict=True))


def test_random_halves_are_the_words_low_half_first() -> None:
    device = torch.device("cpu")
    found = random_halves(19, seed=5, step=3, pair=2, device=device)
    words = philox([torch.tensor([0, 1, 2]), *[torch.full((3,), c) for c in (0, 2, 3)]], 5)
    assert found[0] == words[0][0] & 0xFFFF
    assert found[1] == words[0][0] >> 16
    assert found[8 + 6] == words[3][1] & 0xFFFF
    assert len(found) == 19
    value = torch.tensor([1.0 + 2.0**-9])
    ups = [
        float(round_stochastically(value, torch.bfloat16, torch.tensor([r], dtype=torch.int32)))
        for r in (0, 0xBFFF, 0xC000, 0xFFFF)
    ]
    assert ups == [1.0, 1.0, 1.0 + 2.0**-7, 1.0 + 2.0**-7]  # a quarter of the way up


class Own(ema_fused.BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


def test_bad_arguments_are_refused() -> None:
    pair = [torch.zeros(2).bfloat16()], [torch.ones(2).bfloat16()]
    with pytest.raises(ValueError, match=r"'up' is none of nearest, stochastic"):
        Plan(*pair, rounding="up")
    with pytest.raises(ValueError, match=r"'stochastic' goes with arithmetic 'lerp'"):
        Plan(*pair, rounding="stochastic", arithmetic="delta")
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=r"seed is .*; an integer in \[0, 2\*\*63\)"):
            Plan(*pair, rounding="stochastic", seed=seed)
    Plan(*pair, rounding="stochastic", seed=np.int64(3)).lerp_(0.0, step=np.int64(3))
    for seed in (1.5, True, "1", None):
        with pytest.raises(TypeError, match="an integer is expected"):
            Plan(*pair, rounding="stochastic", seed=seed)  # type: ignore[arg-type]
    plan = Plan(*pair, rounding="stochastic")
    for state in ({"seed": 0}, {"step": 0}):
        with pytest.raises(KeyError, match="missing: not the state of a Plan"):
            plan.load_state_dict(state)
    with pytest.raises(TypeError, match=r"step is 1\.5"):
        plan.load_state_dict({"seed": 0, "step": 1.5})  # type: ignore[dict-item]
    for step in (1.5, True, "1"):
        with pytest.raises(TypeError, match=r"step is .*; an integer is expected"):
            plan.lerp_(0.5, step=step)  # type: ignore[arg-type]
    for tensor in (torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="an integer or a 0-dim int64 tensor"):
            plan.lerp_(0.5, step=tensor)
    assert pair[0][0].tolist() == [0, 0]
    model = small_model()
    with pytest.raises(ValueError, match="needs a class that defines momentum_at"):
        Own(model, rounding="stochastic")
    with pytest.raises(ValueError, match="'up' is none of"):
        ExponentialMovingAverage(model, rounding="up")


def test_the_step_may_be_a_tensor(backend: str) -> None:
    source = [torch.full((1000,), 0.3)]
    results = []
    for step in (5, torch.tensor(5), torch.tensor([5])):
        averaged = [torch.zeros(1000).bfloat16()]
        plan = Plan(averaged, source, rounding="stochastic", backend=backend)
        plan.lerp_(0.01, step=step)
        assert plan.step == 0  # the plan's own count is for those who give none
        plan.lerp_(0.01)
        assert plan.step == 1
        results.append(averaged[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
