"""Stateless updates of lists of tensors, called like torch's foreach functions.

Plans are cached: a call with the same tensors as before reuses their plan. The cache doesn't keep
tensors alive. The look-up takes some 20 nanoseconds per tensor, about what a
:class:`~ema_fused.Plan` of your own takes to check it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ema_fused.engine import backends, operators
from ema_fused.engine.arguments import as_weights
from ema_fused.engine.dtensors import is_sharded, shards_of
from ema_fused.engine.native import NativePart
from ema_fused.engine.pairs import check_lists, check_pair, label, without_average
from ema_fused.engine.parts import Update, swap_all
from ema_fused.engine.plan import Plan
from ema_fused.engine.plan_cache import Kind, PlanCache
from ema_fused.engine.undisturbed import undisturbed

_plans = PlanCache()


def lerp_(
    averaged: Sequence[Tensor],
    source: Sequence[Tensor],
    weight: float | Sequence[float] | Sequence[Tensor] | Tensor,
) -> None:
    """``averaged = averaged + weight * (source - averaged)``, in place, for every pair.

    Takes what ``torch._foreach_lerp_`` takes; on equal dtypes the results are bitwise the same. In
    addition, dtypes may differ within a pair (computed in the wider of the two, at least float32)
    and from pair to pair, devices may differ too (one launch per device), and a pair listed twice
    is updated once. With DTensors each process updates its own shards. Never recorded by autograd,
    but counted by the tensors' version counters, as every operation in place.

    Args:
        averaged: floating-point tensors, updated in place.
        source: as many tensors, each of the shape of its averaged tensor.
        weight: of the source: a number, a 0-dim tensor, a list of one number per pair, or a list of
            one weight tensor per pair (elementwise; computed by torch itself).

    Raises:
        TypeError: a pair that is not floating-point (use :func:`copy_`), or not of plain tensors.
        ValueError: lists, shapes or weights that don't match; tensors that overlap.

    The message names the index of the pair. If an error is raised, nothing has been updated.
    """
    if torch.compiler.is_dynamo_compiling():
        return operators.lerp_(averaged, source, weight)
    if isinstance(weight, Sequence) and any(isinstance(item, Tensor) for item in weight):
        _lerp_by_tensors(averaged, source, weight)
        return
    update_(averaged, source, weight)
    increment_version(averaged)


def update_(
    averaged: Sequence[Tensor],
    source: Sequence[Tensor],
    weight: float | Sequence[float] | Sequence[Tensor] | Tensor,
    *,
    arithmetic: str = "lerp",
    only_copy: Sequence[bool] | None = None,
    copy_others: bool = False,
) -> None:
    """:func:`lerp_` with more options of a :class:`~ema_fused.Plan`; the plan is cached too.

    Args:
        copy_others: copy the pairs that have no average (integers), instead of ``only_copy``.

    Raises:
        TypeError, ValueError: as :class:`~ema_fused.Plan`; nothing has been updated then.
    """
    kind = _kind(averaged, arithmetic, only_copy, copy_others)
    parts = _known_parts(kind, averaged, source)
    shards = None if parts is not None else _shards(averaged, source)
    if shards is not None:
        return update_(
            *shards, weight, arithmetic=arithmetic, only_copy=only_copy, copy_others=copy_others
        )
    if parts is None or any(part.no_average is not None for part in parts):
        if copy_others:
            only_copy = without_average(averaged, source)
        plan = Plan(averaged, source, arithmetic=arithmetic, only_copy=only_copy)
        plan.lerp_(weight)
        _plans.keep(kind, plan.give_up())
        return
    weights, by_pair = as_weights(weight, 1, len(averaged), None)
    for part in parts:
        part.average(Update(weights, by_pair))


def _lerp_by_tensors(
    averaged: Sequence[Tensor],
    source: Sequence[Tensor],
    weights: Sequence[Tensor] | Sequence[float],
) -> None:
    check_lists(averaged, source)
    if len(weights) != len(averaged):
        raise ValueError(
            f"{len(weights)} weights for {len(averaged)} pairs; one a pair is expected"
        )
    tensors: list[Tensor] = []
    for i, (a, s, weight) in enumerate(zip(averaged, source, weights, strict=True)):
        check_pair(a, s, label(i, None))
        if not isinstance(weight, Tensor):
            raise TypeError(f"{label(i, None)}: the weight is {weight!r}, where others are tensors")
        if not a.dtype == s.dtype == weight.dtype:
            raise TypeError(
                f"{label(i, None)}: dtypes {a.dtype} (averaged), {s.dtype} (source) and "
                f"{weight.dtype} (weight); with weight tensors all three must be equal"
            )
        try:
            weight.expand_as(a)
        except RuntimeError:
            raise ValueError(
                f"{label(i, None)}: a weight of shape {tuple(weight.shape)} doesn't broadcast to "
                f"{tuple(a.shape)}"
            ) from None
        tensors.append(weight)
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged), list(source), tensors)


def copy_(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copies every source into its averaged tensor; dtypes and devices may differ.

    Raises:
        TypeError, ValueError: as :func:`lerp_`, but any dtype is allowed.
    """
    if torch.compiler.is_dynamo_compiling():
        return operators.copy_(averaged, source)
    _copy(averaged, source)
    increment_version(averaged)


def _copy(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    kind = _kind(averaged)
    parts = _known_parts(kind, averaged, source)
    shards = None if parts is not None else _shards(averaged, source)
    if shards is not None:
        return _copy(*shards)
    if parts is None:
        plan = Plan(averaged, source)
        plan.copy_()
        _plans.keep(kind, plan.give_up())
        return
    for part in parts:
        part.copy()


def swap_(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Exchanges the contents of every pair, in place.

    Without temporary memory, except where :meth:`ema_fused.Plan.swap_` needs some.

    Raises:
        TypeError: the dtypes of a pair differ.
        ValueError: as :func:`lerp_`; also where two sources overlap.
    """
    if torch.compiler.is_dynamo_compiling():
        return operators.swap_(averaged, source)
    _swap(averaged, source)
    increment_version(averaged)
    increment_version(source)


def _swap(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    kind = _kind(averaged)
    parts = _known_parts(kind, averaged, source)
    shards = None if parts is not None else _shards(averaged, source)
    if shards is not None:
        return _swap(*shards)
    if parts is None or any(part.no_swap is not None for part in parts):
        plan = Plan(averaged, source)
        plan.swap_()
        _plans.keep(kind, plan.give_up())
        return
    if len(parts) > 1:
        undisturbed(functools.partial(swap_all, parts, NativePart.swap))
    else:
        parts[0].swap()


def _kind(
    averaged: object,
    arithmetic: str = "lerp",
    only_copy: Sequence[bool] | None = None,
    copy_others: bool = False,
) -> Kind:
    pairs = len(averaged) if isinstance(averaged, (list, tuple)) else -1
    copied = None if only_copy is None else tuple(only_copy)
    return Kind(pairs, arithmetic, copied, copy_others, backends.pinned(None))


def _shards(averaged: object, source: object) -> tuple[list[Tensor], list[Tensor]] | None:
    """Both lists with DTensors replaced by their shards in this process; None without DTensors."""
    if not isinstance(averaged, (list, tuple)) or not isinstance(source, (list, tuple)):
        return None
    if len(averaged) != len(source):
        return None
    return shards_of(averaged, source)


def _known_parts(kind: Kind, averaged: object, source: object) -> list[NativePart] | None:
    if not isinstance(averaged, (list, tuple)) or not isinstance(source, (list, tuple)):
        return None
    if len(averaged) != len(source) or (averaged and is_sharded(averaged[0])):
        return None
    return _plans.find(kind, list(averaged), list(source))


operators.register(lerp_=lerp_, copy_=copy_, swap_=swap_)
