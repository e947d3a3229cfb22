"""The merged numbers, beside sums in float64 and the tools that others use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ema_fused.merging import merge, open_checkpoint
from ema_fused.merging.summing import TILE, WeightedSum
from tests.merging.checkpoint_files import save

FLOATS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
COMPLEX = (torch.complex64, torch.complex128)
# Of no few decimals: with those, sums are often halfway between two numbers of the dtype.
_ROOTS = [math.sqrt(n) for n in (7, 2, 5, 3)]
WEIGHTS = [root / sum(_ROOTS) for root in _ROOTS]


def merged(path: Path, states: list[dict[str, Tensor]], *args: Any, **kw: Any) -> dict[str, Tensor]:
    """The result of a merge through files of ``torch.save``."""
    files = [save(state, path / f"{i}.pt", "torch") for i, state in enumerate(states)]
    merge(files, *args, output=path / "out.pt", **kw)
    return {name: one.tensor() for name, one in open_checkpoint(path / "out.pt").tensors.items()}


def exact(tensors: list[Tensor], weights: list[float]) -> np.ndarray[Any, Any]:
    """The sum in float64, by NumPy."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    terms = [w * one.to(wide).numpy() for w, one in zip(weights, tensors, strict=True)]
    total: np.ndarray[Any, Any] = np.sum(terms, axis=0)
    return total


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
def test_sums_are_exact_but_for_one_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    states = [{"w": torch.randn(TILE + 1001, dtype=wide).to(dtype)} for _ in WEIGHTS]
    found = merged(tmp_path, states, WEIGHTS)["w"]
    expected = torch.from_numpy(exact([state["w"] for state in states], WEIGHTS))
    assert found.dtype == dtype
    # One rounding of the result, and those of four terms in the dtype of the sum.
    narrow = torch.finfo(dtype).eps / 2
    in_sum = torch.finfo(torch.float64 if dtype.itemsize == 8 else torch.float32).eps * 4
    if dtype == torch.complex64:
        in_sum = torch.finfo(torch.float32).eps * 4
    largest = max(state["w"].to(wide).abs().max().item() for state in states)
    error = (found.to(wide) - expected).abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool((error <= narrow * 1.001 * expected.abs() + in_sum * largest + smallest).all())
    if dtype.itemsize <= 2:
        # In nearly all elements it is the float64 sum rounded once.
        same = (found.to(wide) == expected.to(dtype).to(wide)).double().mean().item()
        assert same > 0.99


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_float64_sums_round_once_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    states = [{"w": torch.randn(3000).to(dtype)} for _ in WEIGHTS]
    found = merged(tmp_path, states, WEIGHTS, float64=True)["w"]
    expected = torch.from_numpy(exact([state["w"] for state in states], WEIGHTS)).to(dtype)
    differing = (found.double() != expected.double()).double().mean().item()
    assert differing < 1e-3  # halfway cases alone, where float64 sums differ in their last bit


def test_what_is_equal_in_all_comes_out_equal_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(2)
    frozen = torch.randn(5000)
    found = merged(tmp_path, [{"w": frozen.clone()} for _ in range(7)], schedule="ema:0.9")
    assert torch.equal(found["w"], frozen)


def test_weights_that_are_not_normalised_scale_the_sum(tmp_path: Path) -> None:
    states = [{"w": torch.randn(100)} for _ in range(3)]
    found = merged(tmp_path, states, [1.0, 2.0, -0.5], normalise=False)["w"]
    expected = exact([state["w"] for state in states], [1.0, 2.0, -0.5])
    assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    found = merged(tmp_path, states, [1.0, 2.0, -0.5])["w"]
    assert np.allclose(found.numpy(), expected / 2.5, rtol=1e-5, atol=1e-6)


def test_another_dtype_is_rounded_to_once(tmp_path: Path) -> None:
    states = [{"w": torch.randn(999)} for _ in range(3)]
    found = merged(tmp_path, states, dtype=torch.bfloat16)["w"]
    expected = torch.from_numpy(exact([state["w"] for state in states], [1 / 3] * 3))
    assert (found.double() == expected.to(torch.bfloat16).double()).double().mean() > 0.99
    up = merged(tmp_path, [{"w": found}] * 2, dtype=torch.float64)["w"]
    assert up.dtype == torch.float64 and torch.equal(up, found.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average_and_reproducible(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    # A third of the way between two neighbours.
    low, high = torch.tensor([1.0, 1.0 + torch.finfo(dtype).eps], dtype=dtype).tolist()
    states = [{"w": torch.full((90_000,), value).to(dtype)} for value in (low, low, high)]
    assert set(merged(tmp_path, states)["w"].tolist()) == {low}
    found = merged(tmp_path, states, rounding="stochastic", seed=3)["w"]
    assert set(found.tolist()) == {low, high}
    assert (found == high).double().mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert torch.equal(found, merged(tmp_path, states, rounding="stochastic", seed=3)["w"])
    other = merged(tmp_path, states, rounding="stochastic", seed=4)["w"]
    assert not torch.equal(found, other)
    # Each tile, and each tensor, has random bits of its own.
    assert not torch.equal(found[:TILE], found[TILE : 2 * TILE])


def test_torch_s_averaged_model_over_the_list_is_the_mean(tmp_path: Path) -> None:
    torch.manual_seed(4)
    models = [nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)) for _ in range(5)]
    averaged = torch.optim.swa_utils.AveragedModel(models[0])
    for model in models:
        averaged.update_parameters(model)
    found = merged(tmp_path, [dict(model.state_dict()) for model in models])
    for name, tensor in averaged.module.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=3e-7, atol=1e-7)
    models[0].load_state_dict(found)


def test_timm_s_sums_in_float64_are_the_mean(tmp_path: Path) -> None:
    """avg_checkpoints.py: float64 sums, divided by the count, clamped, in float32."""
    torch.manual_seed(5)
    states = [{"w": torch.randn(4000)} for _ in range(6)]
    total = sum(state["w"].double() for state in states)
    assert isinstance(total, Tensor)
    expected = (total / len(states)).float()
    torch.testing.assert_close(merged(tmp_path, states)["w"], expected, rtol=2e-7, atol=5e-7)


def test_megatron_s_accumulation_gives_the_same(tmp_path: Path) -> None:
    """weighted_merge.py: float32 zeros, add_(tensor.float(), alpha=weight), then the dtype."""
    torch.manual_seed(6)
    for dtype in (torch.float32, torch.bfloat16):
        states = [{"w": torch.randn(4000).to(dtype)} for _ in WEIGHTS]
        total = torch.zeros(4000)
        for state, weight in zip(states, WEIGHTS, strict=True):
            total.add_(state["w"].float(), alpha=weight)
        found = merged(tmp_path, states, WEIGHTS)["w"]
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found, total.to(dtype), rtol=step, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_mergekit_s_linear_merge_gives_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    linear = pytest.importorskip(
        "mergekit.merge_methods.linear", reason="mergekit 0.1.5 isn't installed"
    )
    base = pytest.importorskip("mergekit.merge_methods.base")
    torch.manual_seed(7)
    states = [{"w": torch.randn(4000).to(dtype)} for _ in WEIGHTS]
    batch = base.TensorBatch([state["w"][None] for state in states])
    expected = linear.linear_merge.merge_batch(
        batch, weight=torch.tensor([WEIGHTS]), normalize=True
    )[0]
    found = merged(tmp_path, states, WEIGHTS)["w"]
    # mergekit's weights are float32 even where its sums are not.
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found, expected, rtol=step, atol=5e-7)


# ---- inf and NaN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, TILE + 5])
def test_what_is_not_finite_is_named_and_refused(tmp_path: Path, value: float, place: int) -> None:
    states = [{"a": torch.ones(3), "w": torch.ones(TILE + 9)} for _ in range(3)]
    states[1]["w"][place] = value
    with pytest.raises(ValueError, match=rf"element {place} of 'w' is .* in .*1\.pt"):
        merged(tmp_path, states)
    assert not (tmp_path / "out.pt").exists()
    found = merged(tmp_path, states, allow_nonfinite=True)["w"]
    assert str(found[place].item()) == str(value)
    assert found.isfinite().sum().item() == TILE + 8


def test_a_result_too_large_for_its_dtype_is_refused(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([1e30, 1.0])} for _ in range(2)]
    with pytest.raises(ValueError, match=r"element 0 of 'w' is too large for torch\.float16"):
        merged(tmp_path, states, dtype=torch.float16)


def test_differences_that_overflow_are_summed_all_the_same() -> None:
    large = torch.tensor([3e38, 1.0])
    into = torch.empty(2)
    assert WeightedSum([0.5, 0.5], torch.float32, torch.float32).run([large, -large], into) is None
    assert into.tolist() == [0.0, 0.0]
    # And a sum over a tile that overflows says nothing of its elements.
    large = torch.full((100,), 3e38)
    into = torch.empty(100)
    assert WeightedSum([1.0], torch.float32, torch.float32).run([large], into) is None
    assert torch.equal(into, large)
