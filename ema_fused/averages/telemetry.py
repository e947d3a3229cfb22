"""The distance of a model from its average, measured during updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Not a possible sum of squares: not measured yet, or the update did nothing.
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
    """Takes a sample at every ``every``-th step; :attr:`last` is the latest that has arrived.

    Args:
        every: steps from one sample to the next; None: no samples.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._last: Distance | None = None
        self._step = 0
        self._sum: Tensor | None = None  # on the host, filled in by the device
        self._arrived: torch.cuda.Event | None = None
        self._is_done: Callable[[], bool] | None = None

    def place_for(self, step: int, device: torch.device) -> Tensor | None:
        """The tensor on ``device`` that the update at ``step`` must write its sum of squares to.

        None if it needn't measure: no sample is due, or the previous one hasn't arrived yet. So a
        sample may be skipped, but one that was started isn't dropped.
        """
        if self._every is None or step % self._every:
            return None
        self._look()
        if self._sum is not None:
            return None
        with torch.inference_mode(False):
            return torch.full((), _NOT_YET, dtype=torch.float64, device=device)

    def fetch(self, step: int, place: Tensor, is_done: Callable[[], bool]) -> None:
        """Starts copying the sum to the host, on the current stream.

        Args:
            step: the step of the update.
            place: the tensor that :meth:`place_for` returned.
            is_done: for a ``place`` on the CPU, tells whether the update that writes it is done.
        """
        self._step, self._arrived, self._is_done = step, None, is_done
        if not place.is_cuda:
            self._sum = place
            return
        self._sum = torch.empty((), dtype=torch.float64, pin_memory=True)
        self._sum.copy_(place, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(place.device))

    def anew(self) -> DistanceSamples:
        """A new object without samples, for copies: a sample of this one may be unfinished."""
        return DistanceSamples(self._every)

    def _look(self) -> None:
        if self._sum is None or (self._arrived is not None and not self._arrived.query()):
            return
        # Ask first, then read: if the update was done, the value that it wrote is read.
        is_done = self._arrived is not None or self._is_done is None or self._is_done()
        total = float(self._sum)
        if total != _NOT_YET:
            self._last = Distance(self._step, math.sqrt(total))
        elif not is_done:
            return
        self._sum = self._is_done = None  # read, or the update did nothing

    @property
    def last(self) -> Distance | None:
        """The latest sample that has arrived on the host; None if there is none."""
        self._look()
        return self._last
