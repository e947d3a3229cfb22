"""Adds up the squared distances between source and averages that the parts of a plan measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_up(distances: Sequence[Tensor], into: Tensor, found_inf: Tensor | None) -> None:
    """Writes the sum over all parts into ``into``; doesn't wait for the device of ``into``.

    Args:
        distances: float64 tensors with one number per average, on any devices.
        into: float64, with one number per average.
        found_inf: one number; unless it is 0, ``into`` is left as it is. None: always write.
    """
    if found_inf is not None and not found_inf.is_cuda and bool(found_inf):
        return
    # ``into`` may be an inference tensor, which can be written in inference mode only.
    with torch.inference_mode():
        total = torch.zeros(into.numel(), dtype=torch.float64, device=into.device)
        for part in distances:
            if part.device.type == "cpu":
                # As Python numbers: a copy from unpinned host memory would synchronise.
                for k, number in enumerate(part.tolist()):
                    total[k] += number
            else:
                total += part.to(into.device)
        total = total.view(into.shape)
        if found_inf is not None and found_inf.is_cuda:
            is_skipped = found_inf.to(into.device).view(()) != 0
            total = torch.where(is_skipped, into, total)
        into.copy_(total)
