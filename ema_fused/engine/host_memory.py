"""Pinned memory on the CPU, for asynchronous copies to and from a device."""

from __future__ import annotations

import torch
from torch import Tensor


def host_memory(tensor_like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the CPU for the average of a tensor.

    Pinned where CUDA is available, so that copies to and from a device are asynchronous.

    Args:
        tensor_like: gives the shape and the order of the dimensions; on any device.
        dtype: of the average; None: that of ``tensor_like``.
    """
    return torch.empty_like(
        tensor_like,
        dtype=dtype,
        device="cpu",
        requires_grad=False,
        pin_memory=torch.cuda.is_available(),
    )
