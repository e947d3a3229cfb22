"""Decides which backend serves which pair of a plan. Nothing else decides it.

pairs -> inspection -> cuda:0 | cuda:1 | cpu   native kernels, one launch each
                    -> foreach                  pairs without a kernel, with one warning
                    -> moved                    sources on another device than their averages
                    -> sparse                   sparse tensors that are only copied
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

from ema_fused.engine import backends
from ema_fused.engine.across_devices import MovedPart
from ema_fused.engine.foreach import ForeachPart
from ema_fused.engine.memory import is_wrapper
from ema_fused.engine.native import NativePart
from ema_fused.engine.pairs import check_pair, label
from ema_fused.engine.parts import Part, Task
from ema_fused.engine.rounding import HALVES
from ema_fused.engine.sparse import SparsePart, is_carried

_DLPACK_CPU = 1
_DLPACK_CUDA = 2

_ROUNDS_BY_POSITION = (
    "torch's CPU loops round 16-bit add_(..., alpha=) differently in the last elements of a "
    "tensor, and foreach, which runs them, agrees with the original to the bit"
)


def split(
    tasks: Sequence[Task], arithmetic: str, backend: str | None, names: Sequence[str] | None
) -> list[Part]:
    """Puts every pair into a part.

    Raises:
        TypeError, ValueError: a pair that no backend can serve (see ``pairs.check_pair``), or pairs
            that overlap each other in memory.
        RuntimeError: the backend asked for can't be used, or not for these tensors.
    """
    pin = backends.pinned(backend)
    groups, refusals = _inspect(tasks, names, pin)
    carried = [task for i in refusals if is_carried(task := tasks[i])]
    refusals = {i: reason for i, reason in refusals.items() if not is_carried(tasks[i])}
    if arithmetic in ("axpby", "delta") and pin is None:
        _leave_to_foreach(tasks, groups, refusals)

    moved = [i for i in refusals if tasks[i].averaged.device != tasks[i].source.device]
    for i in moved:
        del refusals[i]
    if refusals and pin in ("cpu", "cuda"):
        i, reason = next(iter(refusals.items()))
        raise RuntimeError(
            f"backend {pin!r} was asked for and can't serve {label(tasks[i].pair, names)}: "
            f"{reason}; leave backend unset to let torch update such pairs"
        )
    if refusals and pin is None:
        counts = Counter(refusals.values())
        for reason, count in counts.items():
            first = next(tasks[i] for i in refusals if refusals[i] == reason)
            backends.warn_slow_path(reason, label(first.pair, names), count, len(tasks))

    parts: list[Part] = [
        NativePart(device, [tasks[i] for i in places], arithmetic, names)
        for device, places in groups.items()
    ]
    if moved:
        here = functools.partial(split, arithmetic=arithmetic, backend=pin, names=None)
        parts.append(MovedPart([tasks[i] for i in moved], arithmetic, here, names))
    if refusals:
        others = ForeachPart([tasks[i] for i in refusals], arithmetic, names)
        # First, where a subclass of tensors may refuse an operation: nothing is updated yet then.
        parts.insert(0 if others.has_wrappers else len(parts), others)
    if carried:
        parts.append(SparsePart(carried, arithmetic))
    return parts


def _inspect(
    tasks: Sequence[Task], names: Sequence[str] | None, pin: str | None
) -> tuple[dict[str, list[int]], dict[int, str]]:
    """(indices of pairs with a native kernel, by device; the other indices with their reasons)."""
    native = backends.native()
    groups: dict[str, list[int]] = {}
    refusals: dict[int, str] = {}
    if native is None or pin == "foreach":
        reason = backends.why_not("cpu") or "it was asked for"
        refusals = dict.fromkeys(range(len(tasks)), reason)
    else:
        refused, devices = native.inspect(
            [task.averaged for task in tasks], [task.source for task in tasks]
        )
        refusals = dict(refused)
        for kind, index, places in devices:
            name = {_DLPACK_CPU: "cpu", _DLPACK_CUDA: f"cuda:{index}"}.get(kind)
            device = tasks[places[0]].averaged.device
            refusal = backends.why_not_on(device)
            if refusal is None and pin is not None and pin != device.type:
                refusal = f"it is on {device}"
            if name is None or refusal is not None:
                refusals |= dict.fromkeys(places, refusal or f"no kernel is built for {device}")
            else:
                groups[name] = places
        refusals = dict(sorted(refusals.items()))
    for i in refusals:
        if is_carried(tasks[i]):
            continue
        averaged, source = tasks[i].averaged, tasks[i].source
        check_pair(averaged, source, label(tasks[i].pair, names))
        for tensor in (source, averaged):
            if is_wrapper(tensor):
                refusals[i] = f"only the own operations of {type(tensor).__name__} can update it"
    return groups, refusals


def _leave_to_foreach(
    tasks: Sequence[Task], groups: dict[str, list[int]], refusals: dict[int, str]
) -> None:
    """Moves 16-bit pairs from the CPU kernel to foreach, for the reason ``_ROUNDS_BY_POSITION``."""
    kept = []
    for i in groups.get("cpu", []):
        task = tasks[i]
        a, s = task.averaged.dtype, task.source.dtype
        if a == s and a in HALVES and not task.only_copy:
            refusals[i] = _ROUNDS_BY_POSITION
        else:
            kept.append(i)
    if "cpu" in groups:
        groups["cpu"] = kept
        if not kept:
            del groups["cpu"]
