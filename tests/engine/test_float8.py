"""Sources in 8-bit floats are read as their values; averages are not kept in 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ema_fused import Plan, SlowPathWarning
from ema_fused.engine import backends

READ = [torch.float8_e4m3fn, torch.float8_e5m2]
AVERAGED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def every_value(dtype: torch.dtype) -> Tensor:
    """All 256 patterns of 8 bits, NaN and infinities among them."""
    return torch.arange(256).to(torch.uint8).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    # A NaN is a NaN, whatever its bits.
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integers[tensor.itemsize])


@pytest.mark.parametrize("arithmetic", ["lerp", "axpby", "delta", "products"])
@pytest.mark.parametrize("averaged_dtype", AVERAGED, ids=str)
@pytest.mark.parametrize("dtype", READ, ids=str)
def test_every_value_is_averaged_as_its_float32(
    dtype: torch.dtype, averaged_dtype: torch.dtype, arithmetic: str, backend: str
) -> None:
    source = every_value(dtype)
    torch.manual_seed(0)
    averaged = torch.randn(256).to(averaged_dtype)
    expected = averaged.clone()
    Plan([averaged], [source], arithmetic=arithmetic, backend=backend).lerp_(0.3)
    widened = [source.to(torch.float32)]
    Plan([expected], widened, arithmetic=arithmetic, backend=backend).lerp_(0.3)
    assert torch.equal(bits(averaged), bits(expected))


@pytest.mark.parametrize("averaged_dtype", AVERAGED, ids=str)
@pytest.mark.parametrize("dtype", READ, ids=str)
def test_copies_convert_every_value(
    dtype: torch.dtype, averaged_dtype: torch.dtype, backend: str
) -> None:
    source, averaged = every_value(dtype), torch.zeros(256, dtype=averaged_dtype)
    Plan([averaged], [source], backend=backend).copy_()
    assert torch.equal(bits(averaged), bits(source.to(averaged_dtype)))


@pytest.mark.parametrize("dtype", READ, ids=str)
def test_8_bit_tensors_can_be_copied_and_swapped_but_not_averaged(
    dtype: torch.dtype, backend: str
) -> None:
    first = every_value(dtype)
    second = every_value(dtype).view(torch.uint8).flip(0).view(dtype)
    expected = first.view(torch.uint8).clone(), second.view(torch.uint8).clone()
    plan = Plan([first], [second], names=["w"], backend=backend)
    plan.swap_()
    assert torch.equal(first.view(torch.uint8), expected[1])
    assert torch.equal(second.view(torch.uint8), expected[0])
    plan.copy_()
    assert torch.equal(first.view(torch.uint8), expected[0])
    with pytest.raises(TypeError, match=r"'w': torch.float8.* have no average; .* 16 bits"):
        plan.lerp_(0.5)


def test_other_8_bit_types_are_left_to_torch() -> None:
    if backends.native() is None:
        pytest.skip("everything is left to torch")
    backends._warned.clear()
    averaged, source = torch.zeros(4), torch.ones(4).to(torch.float8_e4m3fnuz)
    with pytest.warns(SlowPathWarning, match="this combination of dtypes has no kernel"):
        plan = Plan([averaged], [source])
    plan.lerp_(0.5)
    assert averaged.unique().tolist() == [0.5]
