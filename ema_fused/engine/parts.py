"""What all parts of a plan have in common. A part is the pairs that one backend serves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ema_fused.engine.memory import memory_of
from ema_fused.engine.pairs import can_average
from ema_fused.engine.undisturbed import undisturbed


class Task(NamedTuple):
    """A pair of a plan and what to do with it."""

    pair: int  # index in the plan's lists
    averaged: Tensor
    source: Tensor
    only_copy: bool
    average: int  # which of several averages of one source
    number: int  # counter of the random bits for its rounding


def tasks_of(
    averaged: Sequence[Tensor],
    source: Sequence[Tensor],
    only_copy: Sequence[bool],
    numbers: Sequence[int] | None,
    averages: int,
) -> list[Task]:
    """The tasks of a plan.

    Args:
        averaged: of all averages of one source, one list after the other; likewise ``source``.
        only_copy: one flag per pair of one average; likewise ``numbers``; None is their indices.
        averages: how many there are.
    """
    pairs = len(only_copy)
    own = range(pairs) if numbers is None else numbers
    span = max(own, default=0) + 1
    return [
        Task(pair, averaged[pair], source[pair], only_copy[i], k, k * span + own[i])
        for pair, (k, i) in enumerate(itertools.product(range(averages), range(pairs)))
    ]


class Update(NamedTuple):
    """The arguments of one averaging update, apart from the pairs."""

    weights: Sequence[float | Tensor]  # one per average; tensors are 0-dim
    by_pair: Sequence[float]  # empty, or one per pair, used instead
    found_inf: Tensor | None = None  # one float32 number: unless it is 0, do nothing
    seed: int = 0  # of stochastic rounding, like step
    step: int | Tensor = 0
    # None, or the list to which each part appends a float64 tensor with one squared distance per
    # average. A part that skips the update on the host appends nothing.
    distances: list[Tensor] | None = None

    def weight_of(self, task: Task) -> float:
        """The weight of a pair, on the host."""
        return float(self.by_pair[task.pair] if self.by_pair else self.weights[task.average])

    def is_skipped(self) -> bool:
        """Whether ``found_inf`` is set; reading it synchronises with its device."""
        return self.found_inf is not None and bool(self.found_inf)


class Changed(NamedTuple):
    """A tensor whose dtype or shape has changed: its pair, its side, and what was planned."""

    pair: int
    is_source: bool
    planned: str


def kind_of(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


class Part(Protocol):
    """Pairs of a plan that one backend serves; all indices are those of the plan's lists."""

    backend: str
    no_average: int | None  # the first pair that has no average and isn't only copied
    no_swap: int | None  # the first pair whose dtypes differ

    @property
    def elements(self) -> int: ...

    def changed(self) -> Changed | None:
        """The first tensor whose dtype or shape is no longer what was planned."""

    def ready(self) -> bool:
        """False where a tensor's dtype, shape, layout or device is no longer what was planned."""

    # Each does nothing and returns False if ready() is False.
    def average(self, update: Update) -> bool: ...

    def copy(self) -> bool: ...

    def swap(self) -> bool: ...


class ListedPart:
    """A part that keeps its tensors in lists and updates them with torch's functions.

    Swapping needs a temporary as large as one tensor.
    """

    def __init__(self, tasks: Sequence[Task], arithmetic: str) -> None:
        self._tasks = list(tasks)
        self._arithmetic = arithmetic
        self._kinds = self._current_kinds()
        self.no_average = next(
            (t.pair for t in tasks if not t.only_copy and not can_average(t.averaged, t.source)),
            None,
        )
        self.no_swap = next(
            (t.pair for t in tasks if t.averaged.dtype != t.source.dtype),
            None,
        )

    def _current_kinds(self) -> list[tuple[torch.device, str]]:
        sides = [t.averaged for t in self._tasks] + [t.source for t in self._tasks]
        return [(tensor.device, kind_of(tensor)) for tensor in sides]

    def ready(self) -> bool:
        return self._current_kinds() == self._kinds

    def changed(self) -> Changed | None:
        kinds = zip(self._current_kinds(), self._kinds, strict=True)
        count = len(self._tasks)
        for k, ((_, now), (_, planned)) in enumerate(kinds):
            if now != planned:
                return Changed(self._tasks[k % count].pair, k >= count, planned)
        return None

    def _distinct(self) -> list[Task]:
        """The pairs to update: tied ones once, those whose two sides are the same memory never."""
        seen: set[tuple[object, ...]] = set()
        tasks = []
        for task in self._tasks:
            if task.averaged.numel() == 0:
                continue
            sides = [memory_of(tensor) for tensor in (task.averaged, task.source)]
            key = (task.average, *sides)
            if sides[0] == sides[1] or key in seen:
                continue
            seen.add(key)
            tasks.append(task)
        return tasks

    @property
    def elements(self) -> int:
        return sum(task.averaged.numel() for task in self._distinct())

    @torch.no_grad()
    def copy(self) -> bool:
        if not self.ready():
            return False
        for task in self._distinct():
            task.averaged.copy_(task.source)
        return True

    @torch.no_grad()
    def swap(self) -> bool:
        if not self.ready():
            return False
        undisturbed(functools.partial(swap_all, self._distinct(), _swap))
        return True


_Swappable = TypeVar("_Swappable")


def swap_all(items: Iterable[_Swappable], swap: Callable[[_Swappable], object]) -> None:
    """Swaps all, or none if one can't be swapped (memory may run out)."""
    done = []
    try:
        for item in items:
            swap(item)
            done.append(item)
    except BaseException:
        for item in done:
            swap(item)
        raise


def _swap(task: Task) -> None:
    held = task.averaged.clone()
    task.averaged.copy_(task.source)
    try:
        task.source.copy_(held)
    except BaseException:
        task.averaged.copy_(held)
        raise
