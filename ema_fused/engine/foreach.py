"""The fallback: the same updates by torch's own functions, on any device, without compiled code.

It also states readably what the native kernels compute; tests compare the two.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ema_fused.engine.memory import is_wrapper
from ema_fused.engine.pairs import can_average, label
from ema_fused.engine.parts import ListedPart, Task, Update
from ema_fused.engine.rounding import HALVES, random_halves, round_stochastically


def compute_dtype(averaged: torch.dtype, source: torch.dtype) -> torch.dtype:
    """The dtype a mixed pair computes in: the wider of the two, at least float32."""
    wide = (torch.float64, torch.complex64, torch.complex128)
    if averaged == source and averaged in wide:
        return averaged
    return torch.float64 if torch.float64 in (averaged, source) else torch.float32


def _average_same(
    averaged: list[Tensor], source: list[Tensor], weights: list[float], arithmetic: str
) -> None:
    """Pairs of equal dtypes, by the operations that define each arithmetic."""
    if arithmetic in ("lerp", "stochastic"):
        # A subclass of tensors may have lerp_ and no _foreach_lerp_.
        if len(weights) > 1 and all(weight == weights[0] for weight in weights):
            torch._foreach_lerp_(averaged, source, weights[0])
        else:
            for a, s, weight in zip(averaged, source, weights, strict=True):
                a.lerp_(s, weight)
        return
    for a, s, weight in zip(averaged, source, weights, strict=True):
        if arithmetic == "axpby":
            a.mul_(1 - weight).add_(s, alpha=weight)
        elif arithmetic == "products" and (is_wrapper(a) or is_wrapper(s)):
            a.copy_(a * (1 - weight) + s * weight)
        elif arithmetic == "products":
            a.mul_(1 - weight).add_(s * weight)
        else:
            a.add_(s - a, alpha=weight)


def _average_mixed(averaged: Tensor, source: Tensor, weight: float, arithmetic: str) -> None:
    """A pair of two dtypes: computed in the wider one, then rounded to the averaged tensor's."""
    dtype = compute_dtype(averaged.dtype, source.dtype)
    a = averaged.to(dtype)
    s = source.to(dtype)
    if arithmetic in ("lerp", "stochastic"):
        result = torch.lerp(a, s, weight)
    elif arithmetic == "axpby":
        kept = (a * (1 - weight)).to(averaged.dtype).to(dtype)
        result = kept.add_(s, alpha=weight)
    elif arithmetic == "products":
        kept, taken = (
            product.to(averaged.dtype).to(dtype) for product in (a * (1 - weight), s * weight)
        )
        result = kept + taken
    else:
        result = a.add(s - a, alpha=weight)
    averaged.copy_(result)


def _average_stochastically(task: Task, weight: float, seed: int, step: int) -> None:
    """A 16-bit average: computed as lerp in float32 (or wider), rounded at random."""
    averaged, source = task.averaged, task.source
    dtype = compute_dtype(averaged.dtype, source.dtype)
    mean = torch.lerp(averaged.to(dtype), source.to(dtype), weight).to(torch.float32)
    # Elements are numbered in memory order, as the kernels number them for the random bits.
    order = sorted(range(averaged.dim()), key=averaged.stride, reverse=True)
    flat = mean.permute(order).reshape(-1)
    random = random_halves(
        flat.numel(), seed=seed, step=step, pair=task.number, device=averaged.device
    )
    rounded = round_stochastically(flat, averaged.dtype, random)
    averaged.permute(order).copy_(rounded.view(averaged.permute(order).shape))


# torch sums this many numbers on one thread.
_ROW = 8192


def _sum(values: Tensor) -> Tensor:
    """The sum of a flat tensor, row by row: bitwise the same for any number of threads."""
    while values.numel() > _ROW:
        in_rows = values.numel() // _ROW * _ROW
        rows = values[:in_rows].view(-1, _ROW)
        values = torch.cat([rows.sum(dim=1), values[in_rows:]])
    return values.sum()


def squared_distances(tasks: Sequence[Task], averages: int) -> list[Tensor]:
    """The squared distance of each average from its sources: one float64 tensor per device.

    Differences are computed in the pair's compute dtype, squares and sums in float64.
    """
    sums: dict[torch.device, Tensor] = {}
    for task in tasks:
        a, s = task.averaged, task.source
        if task.only_copy:
            continue
        dtype = compute_dtype(a.dtype, s.dtype)
        difference = s.to(dtype) - a.to(dtype)
        if a.is_complex():
            difference = torch.view_as_real(difference)
        squares = difference.to(torch.float64).square_().reshape(-1)
        if a.device not in sums:
            sums[a.device] = torch.zeros(averages, dtype=torch.float64, device=a.device)
        sums[a.device][task.average] += _sum(squares)
    return list(sums.values())


class ForeachPart(ListedPart):
    """Pairs updated by torch's functions on the device where they are.

    Wrappers (tensors of subclasses that keep their elements in other tensors) are updated one by
    one, by the functions that everybody calls, which their class answers.
    """

    backend = "foreach"

    def __init__(
        self, tasks: Sequence[Task], arithmetic: str, names: Sequence[str] | None = None
    ) -> None:
        super().__init__(tasks, arithmetic)
        self._names = names
        # One of each combination of classes, to try an operation on before it writes anything.
        self._examples = {
            (type(t.averaged), type(t.source), t.averaged.dtype, t.source.dtype, t.only_copy): t
            for t in reversed(tasks)
            if is_wrapper(t.averaged) or is_wrapper(t.source)
        }
        self.has_wrappers = bool(self._examples)
        self._tried: set[str] = set()

    @torch.no_grad()
    def average(self, update: Update) -> bool:
        if not self.ready():
            return False
        if update.is_skipped():
            return True
        self._try("average", lambda task: self._average_each([task], update))
        tasks = self._distinct()
        if update.distances is not None:
            update.distances.extend(squared_distances(tasks, len(update.weights)))
        self._average_each(tasks, update)
        return True

    def copy(self) -> bool:
        self._try("copy", _copy)
        return super().copy()

    def swap(self) -> bool:
        self._try("copy", _copy)
        return super().swap()

    def _average_each(self, tasks: Sequence[Task], update: Update) -> None:
        same: dict[tuple[object, ...], list[Task]] = {}
        for task in tasks:
            a, s = task.averaged, task.source
            if task.only_copy or not can_average(a, s):
                a.copy_(s)
            elif self._arithmetic == "stochastic" and a.dtype in HALVES:
                _average_stochastically(task, update.weight_of(task), update.seed, int(update.step))
            elif a.dtype == s.dtype and (a.dtype in HALVES or a.dtype.itemsize > 2):
                alone = task.pair if is_wrapper(a) or is_wrapper(s) else None
                same.setdefault((a.device, a.dtype, alone), []).append(task)
            else:
                _average_mixed(a, s, update.weight_of(task), self._arithmetic)
        for alike in same.values():
            _average_same(
                [task.averaged for task in alike],
                [task.source for task in alike],
                [update.weight_of(task) for task in alike],
                self._arithmetic,
            )

    @torch.no_grad()
    def _try(self, operation: str, run: Callable[[Task], None]) -> None:
        """Runs ``operation`` on copies of one average of each class; all are left unchanged.

        Raises:
            TypeError: a class doesn't take part in it.
        """
        if not self._examples or operation in self._tried:
            return
        for task in self._examples.values():
            try:
                run(task._replace(averaged=task.averaged.detach().clone()))
            except Exception as error:  # whatever a class raises
                classes = dict.fromkeys(type(t).__name__ for t in (task.averaged, task.source))
                reason = textwrap.shorten(str(error), 200)
                raise TypeError(
                    f"{label(task.pair, self._names)}: {' and '.join(classes)} can't "
                    f"{operation}: {type(error).__name__}: {reason}. Another arithmetic asks for "
                    f"other operations: AveragedWeights(model, arithmetic='delta' or 'lerp'); "
                    f"frozen parameters can be shared with the model instead: share_frozen=True"
                ) from error
        self._tried.add(operation)


def _copy(task: Task) -> None:
    task.averaged.copy_(task.source)
