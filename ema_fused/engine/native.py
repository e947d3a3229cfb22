"""The part of a plan that the compiled kernels update: pairs on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ema_fused.engine import backends
from ema_fused.engine.pairs import label, overlap_error
from ema_fused.engine.parts import Changed, Task, Update


class NativePart:
    """Pairs on one device: a chunk table in its memory, and one launch per operation."""

    def __init__(
        self, device: str, tasks: Sequence[Task], arithmetic: str, names: Sequence[str] | None
    ) -> None:
        extension = backends.native()
        assert extension is not None, "routing asks for this part only where the extension is"
        self.device = torch.device(device)
        self.backend = self.device.type
        self._indices = [task.pair for task in tasks]
        self._names = names
        self._overlap_error = extension.OverlapError
        self._operation = extension.Operation
        self.AVERAGE = extension.Operation.AVERAGE
        with self._overlaps_explained():
            self._plan: Any = extension.Plan(
                [task.averaged for task in tasks],
                [task.source for task in tasks],
                [(task.only_copy, task.average, task.number) for task in tasks],
                getattr(extension.Arithmetic, arithmetic.upper()),
            )
        self.no_average = self._index(self._plan.no_average)
        self.no_swap = self._index(self._plan.no_swap)

    def _index(self, place: int) -> int | None:
        return None if place < 0 else self._indices[place]

    @contextmanager
    def _overlaps_explained(self) -> Iterator[None]:
        """Raises overlap errors with the names of the pairs."""
        try:
            yield
        except self._overlap_error as error:
            raise self._explained(error) from None

    def _explained(self, error: Exception) -> ValueError:
        first, second, what = error.args
        pair = label(self._indices[first], self._names)
        other = label(self._indices[second], self._names)
        return overlap_error(pair, other, what)

    @property
    def compiled(self) -> Any:
        """The extension's Plan, for callers that launch with the least overhead."""
        return self._plan

    @property
    def places(self) -> list[int]:
        """The indices of its pairs in the plan's lists."""
        return self._indices

    def release(self) -> None:
        """Drops its references to the tensors; then run it only after :meth:`matches` was True."""
        self._plan.release()

    def matches(self, averaged: list[Tensor], source: list[Tensor]) -> bool:
        """Whether memory, dtype, shape, strides and device of these pairs are those planned for."""
        return bool(self._plan.matches(averaged, source))

    def ready(self) -> bool:
        with self._overlaps_explained():
            return bool(self._plan.ready())

    def changed(self) -> Changed | None:
        place, is_source, planned = self._plan.changed()
        return None if place < 0 else Changed(self._indices[place], is_source, planned)

    @property
    def elements(self) -> int:
        return int(self._plan.elements)

    @property
    def chunks(self) -> int:
        return int(self._plan.chunks)

    def average(self, update: Update) -> bool:
        found_inf: Tensor | None = None
        if update.found_inf is not None:
            if update.found_inf.is_cuda and self.backend == "cuda":
                found_inf = update.found_inf.to(self.device)
            elif update.is_skipped():
                return self.ready()
        weights = [self._placed(weight) for weight in update.weights]
        step = update.step
        if isinstance(step, Tensor):
            step = step.to(self.device) if self._reads(step) else int(step)
        sums: Tensor | None = None
        if update.distances is not None:
            # Uninitialised: every launch writes all of it, even if the table is rebuilt first.
            shape = (len(weights), self._plan.partials)
            sums = torch.empty(shape, dtype=torch.float64, device=self.device)
        # The kernel gets bare addresses: local variables keep the tensors alive until the launch.
        with self._overlaps_explained():
            has_run = bool(
                self._plan.run_with(
                    self.AVERAGE,
                    0.0,
                    [_address(weight) for weight in weights],
                    [update.by_pair[i] for i in self._indices] if update.by_pair else [],
                    0 if found_inf is None else found_inf.data_ptr(),
                    update.seed,
                    0 if isinstance(step, Tensor) else step,
                    step.data_ptr() if isinstance(step, Tensor) else 0,
                    (0, 0, 0) if sums is None else (sums.data_ptr(), *sums.shape),
                )
            )
        if has_run and update.distances is not None and sums is not None:
            update.distances.append(sums.sum(dim=1))
        return has_run

    def _reads(self, scalar: Tensor) -> bool:
        """Whether the kernel can read the number from device memory, without synchronising."""
        return scalar.is_cuda and self.backend == "cuda"

    def _placed(self, weight: float | Tensor) -> float | Tensor:
        if not isinstance(weight, Tensor):
            return weight
        if not self._reads(weight):
            return float(weight)
        exact = weight.dtype in (torch.float32, torch.float64)
        return weight.detach().to(self.device, weight.dtype if exact else torch.float64)

    def copy(self) -> bool:
        return self._run(self._operation.COPY)

    def swap(self) -> bool:
        return self._run(self._operation.SWAP)

    def _run(self, operation: Any) -> bool:
        with self._overlaps_explained():
            return bool(self._plan.run(operation))


def _address(weight: float | Tensor) -> tuple[float, int, bool]:
    """A weight as the extension takes it: (number, address or 0, whether that is a float64)."""
    if isinstance(weight, Tensor):
        return 0.0, weight.data_ptr(), weight.dtype == torch.float64
    return weight, 0, False
