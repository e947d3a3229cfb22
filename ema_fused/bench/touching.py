"""Cold caches: what is touched before a sample, as the rest of a training step would do it."""

from __future__ import annotations

import torch

from ema_fused.bench.timing import Effort


class Touching:
    """Memory and small Python objects that are touched at each call.

    Afterwards the caches hold neither the tensors of an update nor the objects that lead to them.

    Attributes:
        bytes: how much memory, in one flat float32 tensor.
        objects: how many Python objects: half of them lists, each with a string.
    """

    def __init__(self, effort: Effort) -> None:
        self._flat = torch.zeros(effort.cold_bytes // 4)
        self._lists = [[f"object {place}"] for place in range(effort.cold_objects // 2)]
        self.bytes = 4 * self._flat.numel()
        self.objects = 2 * len(self._lists)

    def __call__(self) -> int:
        self._flat.add_(1.0)
        return sum(len(text) for (text,) in self._lists)
