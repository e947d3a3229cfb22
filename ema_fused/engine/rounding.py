"""Stochastic rounding by torch's own functions, for the ``foreach`` backend.

The results are bitwise those of the native kernels.

The random bits are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"), keyed by the seed; the counter is (element // 8 in two words, pair, step). Each of the four
resulting words gives 16 bits to each of two elements, the low half to the first. ``element`` is the
index in memory order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ema_fused.engine.checks import as_integer

ROUNDINGS = ("nearest", "stochastic")
HALVES = (torch.float16, torch.bfloat16)

_MASK = 0xFFFFFFFF


def check_rounding(rounding: str) -> None:
    """Raises ValueError unless ``rounding`` is in ``ROUNDINGS``."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding {rounding!r} is none of {', '.join(ROUNDINGS)}")


def check_seed(seed: object) -> int:
    """``seed`` as an int; raises TypeError or ValueError unless it is one in [0, 2**63)."""
    number = as_integer(seed, "seed")
    if not 0 <= number < 2**63:
        raise ValueError(f"seed is {number}; an integer in [0, 2**63) is expected")
    return number


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Four 32-bit words for each counter.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2**32).
        seed: the 64-bit key.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        # Products overflow int64, but wrap around and so keep the bits that are used.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK) ^ c1 ^ key0,
            product1 & _MASK,
            (product0 >> 32 & _MASK) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = key0 + 0x9E3779B9 & _MASK, key1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def random_halves(count: int, *, seed: int, step: int, pair: int, device: torch.device) -> Tensor:
    """16 random bits for each of ``count`` elements, as int32."""
    block = torch.arange(-(-count // 8), device=device, dtype=torch.int64)
    constant = torch.zeros_like(block)
    words = philox([block & _MASK, block >> 32, constant + pair, constant + (step & _MASK)], seed)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).flatten()[:count].to(torch.int32)


def round_stochastically(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """``value`` in a 16-bit dtype, rounded down or up at random, with expected value ``value``.

    Args:
        value: float32, flat.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        random: 16 random bits per element, int32.
    """
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    if dtype == torch.bfloat16:
        # The sign is added at the end: a right shift of int32 would extend it.
        half = torch.where(is_nan, 0x7FC0, (magnitude + random) >> 16)
        sign = torch.where(is_nan, 0, bits >> 16 & 0x8000)
    else:
        # Below 2**-14, float16 is subnormal and its unit in the last place is 2**-24. Values are
        # taken in units of 2**-40, so that the 16 random bits fit below that place.
        is_tiny = magnitude < 0x38800000
        units = (torch.where(is_tiny, value.abs(), 0.0) * 2.0**40).to(torch.int32)
        normal = (magnitude - (112 << 23) + (random >> 3)) >> 13
        half = torch.where(is_tiny, (units + random) >> 16, normal)
        huge = torch.where(is_nan, 0x7E00, 0x7C00)
        half = torch.where(magnitude >= 0x47800000, huge, half)
        sign = bits >> 16 & 0x8000
    return (half | sign).to(torch.int16).view(dtype)
