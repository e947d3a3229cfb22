"""How far a model is from its average, measured while it is updated and read without waiting."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# What no sum of squares is: the measurement has not been made, or the update did nothing.
_NOT_YET = -1.0


class Distance(NamedTuple):
    """The norm of the difference between a model and its average, just before an update.

    Attributes:
        step: the ``steps`` of the average at that update.
        value: the square root of the sum of squared differences over all averaged elements.
    """

    step: int
    value: float


class DistanceSamples:
    """Takes a sample at every ``every``-th step; the last one that has arrived is :attr:`last`."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._last: Distance | None = None
        self._step = 0
        self._sum: Tensor | None = None  # on the host, filled in by the device
        self._arrived: torch.cuda.Event | None = None

    def place_for(self, step: int, device: torch.device) -> Tensor | None:
        """Where the update of ``step`` is to write its sum; None: it is not to measure."""
        if self._every is None or step % self._every:
            return None
        self._look()
        return torch.full((), _NOT_YET, dtype=torch.float64, device=device)

    def fetch(self, step: int, place: Tensor) -> None:
        """Starts bringing the sum to the host, on the current stream."""
        self._step, self._arrived = step, None
        if not place.is_cuda:
            self._sum = place
            return
        self._sum = torch.empty((), dtype=torch.float64, pin_memory=True)
        self._sum.copy_(place, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(place.device))

    def anew(self) -> DistanceSamples:
        """Another without samples: this one's may be on its way."""
        return DistanceSamples(self._every)

    def _look(self) -> None:
        if self._sum is None or (self._arrived is not None and not self._arrived.query()):
            return
        total = float(self._sum)
        if total == _NOT_YET:
            return  # an offloaded update that is under way, or one that was skipped
        self._last = Distance(self._step, math.sqrt(total))
        self._sum = None

    @property
    def last(self) -> Distance | None:
        """The last sample that is known on the host."""
        self._look()
        return self._last
