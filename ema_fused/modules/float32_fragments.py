"""Float32 copies of whole weights that DeepSpeed's ZeRO-1 and ZeRO-2 spread over the ranks.

There each rank has all weights, and its optimizer steps on float32 copies of a part of them, from
which the weights are made anew at each step. So what is written into the weights alone is lost at
the next step. ``deepspeed`` itself is never imported: its parameters know their copies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def has_fragments(parameters: Iterable[Any]) -> bool:
    """Whether an optimizer of DeepSpeed steps on copies of parts of these parameters, on any rank.

    Of a parameter whose copies are all on other ranks, the mapping is there and None.
    """
    return any(hasattr(parameter, "_hp_mapping") for parameter in parameters)


@torch.no_grad()
def write_fragments(parameter: Any, average: Tensor) -> None:
    """Writes ``average`` into this rank's part of the copy of ``parameter``, if there is one."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return
    place = mapping.lp_fragment_address
    mapping.get_hp_fragment().copy_(average.reshape(-1)[place.start : place.start + place.numel])
