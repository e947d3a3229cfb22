"""The squared distance between source and averages, put together from what the parts of a plan
have measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_up(distances: Sequence[Tensor], into: Tensor, found_inf: Tensor | None) -> None:
    """Writes the sum of all parts, without waiting for a device where ``into`` is on it.

    Args:
        distances: float64, one number an average each, on any devices.
        into: float64; as many numbers.
        found_inf: one number: anything but 0 leaves ``into`` as it is.
    """
    if found_inf is not None and not found_inf.is_cuda and bool(found_inf):
        return
    # Writes to a tensor that was made in it too, which can't be done from outside.
    with torch.inference_mode():
        total = torch.zeros(into.numel(), dtype=torch.float64, device=into.device)
        for part in distances:
            if part.device.type == "cpu":
                # As numbers: a copy from the host would wait for the device.
                for k, number in enumerate(part.tolist()):
                    total[k] += number
            else:
                total += part.to(into.device)
        total = total.view(into.shape)
        if found_inf is not None and found_inf.is_cuda:
            is_skipped = found_inf.to(into.device).view(()) != 0
            total = torch.where(is_skipped, into, total)
        into.copy_(total)
