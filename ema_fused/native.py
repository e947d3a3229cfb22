"""Pairs of one device, served by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ema_fused import backends
from ema_fused.pairs import label
from ema_fused.parts import Changed


class NativePart:
    """A chunk table in the device's memory, and one launch an operation."""

    def __init__(
        self,
        device: str,
        averaged: list[Tensor],
        source: list[Tensor],
        only_copy: list[bool],
        arithmetic: str,
        indices: Sequence[int],
        names: Sequence[str] | None,
    ) -> None:
        extension = backends.native()
        assert extension is not None, "routing asks for this part only where the extension is"
        self.backend = device.partition(":")[0]
        self.indices = list(indices)
        self._names = names
        self._overlap_error = extension.OverlapError
        self._operation = extension.Operation
        self.AVERAGE = extension.Operation.AVERAGE
        try:
            self._plan: Any = extension.Plan(
                averaged, source, only_copy, getattr(extension.Arithmetic, arithmetic.upper())
            )
        except extension.OverlapError as error:
            raise self._explained(error) from None
        self.no_average = self._index(self._plan.no_average)
        self.no_swap = self._index(self._plan.no_swap)

    def _index(self, place: int) -> int | None:
        return None if place < 0 else self.indices[place]

    def _explained(self, error: Exception) -> ValueError:
        first, second, what = error.args
        pair = label(self.indices[first], self._names)
        other = label(self.indices[second], self._names)
        return ValueError(
            f"{pair} and {other}: {what}, so the result would depend on the order of the updates; "
            f"pass one of the two, or make one a copy: tensor.clone()"
        )

    def _run(self, operation: Any, weight: float = 0.0, weights: Sequence[float] = ()) -> bool:
        try:
            return bool(self._plan.run(operation, weight, weights))
        except self._overlap_error as error:
            raise self._explained(error) from None

    @property
    def run(self) -> Any:
        """The compiled ``run(operation, weight) -> bool``, for the shortest way to a launch."""
        return self._plan.run

    def ready(self) -> bool:
        return bool(self._plan.ready())

    def changed(self) -> Changed | None:
        place, is_source, planned = self._plan.changed()
        return None if place < 0 else Changed(self.indices[place], is_source, planned)

    @property
    def elements(self) -> int:
        return int(self._plan.elements)

    @property
    def chunks(self) -> int:
        return int(self._plan.chunks)

    @property
    def table_bytes(self) -> int:
        return int(self._plan.table_bytes)

    def average(self, weight: float, weights: Sequence[float]) -> bool:
        return self._run(self._operation.AVERAGE, weight, weights)

    def copy(self) -> bool:
        return self._run(self._operation.COPY)

    def swap(self) -> bool:
        return self._run(self._operation.SWAP)
