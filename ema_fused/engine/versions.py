"""The version counters of tensors, which tell autograd that a tensor it has saved was written.

Torch's own operations in place count them up; native kernels, which write bare memory, don't.
Without them a backward pass through values that were overwritten since the forward pass gives wrong
gradients, where torch raises ``modified by an inplace operation``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import increment_version


class VersionCounters:
    """The version counters of ``tensors``, of each once."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())

    def increment(self) -> None:
        """Counts each up by one; takes some 40 nanoseconds a tensor, and nothing on the device."""
        increment_version(self._tensors)


def version_of(tensor: Tensor) -> int:
    """The present count; 0 of an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version
