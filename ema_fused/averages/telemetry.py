"""How far a model is from its average, measured while it is updated and read without waiting."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """Takes a sample at every ``every``-th step; the last one that has arrived is :attr:`last`.

    Args:
        every: steps from one sample to the next; None: none is taken.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._last: Distance | None = None
        self._step = 0
        self._sum: Tensor | None = None  # on the host, filled in by the device
        self._arrived: torch.cuda.Event | None = None
        self._is_done: Callable[[], bool] | None = None

    def place_for(self, step: int, device: torch.device) -> Tensor | None:
        """Where the update of ``step``, whose averages are on ``device``, is to write its sum.

        None: it is not to measure, or the sample before is still on its way: the next may be later,
        but each that was begun arrives.
        """
        if self._every is None or step % self._every:
            return None
        self._look()
        if self._sum is not None:
            return None
        with torch.inference_mode(False):
            return torch.full((), _NOT_YET, dtype=torch.float64, device=device)

    def fetch(self, step: int, place: Tensor, is_done: Callable[[], bool]) -> None:
        """Starts bringing the sum to the host, on the current stream.

        Args:
            step: of the update.
            place: what :meth:`place_for` gave.
            is_done: says of a place on the CPU whether the update is done that writes it.
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
        """Another without samples: this one's may be on its way."""
        return DistanceSamples(self._every)

    def _look(self) -> None:
        if self._sum is None or (self._arrived is not None and not self._arrived.query()):
            return
        # In this order: what is written once it is done is there then.
        is_done = self._arrived is not None or self._is_done is None or self._is_done()
        total = float(self._sum)
        if total != _NOT_YET:
            self._last = Distance(self._step, math.sqrt(total))
        elif not is_done:
            return
        self._sum = self._is_done = None  # known, or of an update that did nothing

    @property
    def last(self) -> Distance | None:
        """The last sample that is known on the host."""
        self._look()
        return self._last
