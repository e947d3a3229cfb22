"""The parts of a plan, run together: all of them, or none where a tensor isn't as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ema_fused.engine.native import NativePart
from ema_fused.engine.parts import Changed, Part, Task, Update, swap_all
from ema_fused.engine.rounding import HALVES
from ema_fused.engine.routing import split
from ema_fused.engine.undisturbed import undisturbed


class PlannedParts:
    """The parts of a plan for its tensors as they are; for others, a plan makes new ones.

    Each operation does nothing and returns False if a tensor isn't as planned.

    Args:
        tasks: all pairs of the plan.
        arithmetic: of the plan, or ``"stochastic"``.
        backend: the one asked for; None: the fastest for each pair.
        labels: the names of the pairs, for messages.

    Attributes:
        parts: what :func:`~ema_fused.engine.routing.split` has made of them.
        no_average: the first pair that has no average and isn't only copied; None: there is none.
        no_swap: the first pair whose dtypes differ; None: there is none.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        arithmetic: str,
        backend: str | None,
        labels: Sequence[str] | None,
    ) -> None:
        self.parts = split(tasks, arithmetic, backend, labels)
        self.no_average = _first(part.no_average for part in self.parts)
        self.no_swap = _first(part.no_swap for part in self.parts)
        self._draws = arithmetic == "stochastic" and any(
            task.averaged.dtype in HALVES and not task.only_copy for task in tasks
        )

    @property
    def native(self) -> list[NativePart]:
        """Those that the compiled kernels update."""
        return [part for part in self.parts if isinstance(part, NativePart)]

    def ready(self) -> bool:
        return all(part.ready() for part in self.parts)

    def changed(self) -> Changed | None:
        """The first tensor whose dtype or shape is no longer what was planned."""
        changes = (part.changed() for part in self.parts)
        return next((change for change in changes if change is not None), None)

    def average(self, update: Update) -> bool:
        """Averages all pairs.

        Raises:
            RuntimeError: a CUDA graph would draw the same random bits at every replay.
        """
        if self._draws and not (isinstance(update.step, Tensor) and update.step.is_cuda):
            _refuse_to_repeat()
        return self._run(lambda part: part.average(update))

    def copy(self) -> bool:
        return self._run(lambda part: part.copy())

    def _run(self, operation: Callable[[Part], bool]) -> bool:
        if len(self.parts) == 1:
            return operation(self.parts[0])
        if not self.ready():
            return False
        for part in self.parts:
            if not operation(part):
                raise changed_meanwhile()
        return True

    def swap(self) -> bool:
        return self.parts[0].swap() if len(self.parts) == 1 else undisturbed(self._swap_all)

    def _swap_all(self) -> bool:
        if not self.ready():
            return False
        swap_all(self.parts, _swap_one)
        return True


def _refuse_to_repeat() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a captured update with stochastic rounding would draw the same random bits at "
            "every replay; pass step=, a 0-dim int64 tensor on the device, and advance it in "
            "the graph: step += 1"
        )


def _first(pairs: Iterable[int | None]) -> int | None:
    return min((pair for pair in pairs if pair is not None), default=None)


def _swap_one(part: Part) -> None:
    if not part.swap():
        raise changed_meanwhile()


def changed_meanwhile() -> RuntimeError:
    """The error where a part finds a tensor changed that was as planned a moment ago."""
    return RuntimeError(
        "a tensor was changed by another thread while it was being updated, and perhaps not all "
        "pairs are updated; change tensors between updates alone"
    )
