"""From lists of tensors to the parts of a plan: which backend serves which pair. The one choice.

pairs -> inspection -> cuda:0 | cuda:1 | cpu   native kernels, one launch each
                    -> foreach                  what has no kernel, with one warning
                    -> moved                    sources that live on another device
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ema_fused import backends
from ema_fused.foreach import ForeachPart
from ema_fused.moved import MovedPart
from ema_fused.native import NativePart
from ema_fused.pairs import check_pair, label
from ema_fused.parts import Part

_DLPACK_CPU = 1
_DLPACK_CUDA = 2

_ROUNDS_BY_POSITION = (
    "torch's CPU loops round 16-bit add_(..., alpha=) differently in the last elements of a "
    "tensor, and foreach, which runs them, agrees with the original to the bit"
)


def split(
    averaged: list[Tensor],
    source: list[Tensor],
    only_copy: list[bool],
    arithmetic: str,
    backend: str | None,
    names: Sequence[str] | None,
) -> list[Part]:
    """Puts every pair into a part.

    Raises:
        TypeError, ValueError: a pair that no backend can serve (see ``pairs.check_pair``), or pairs
            that overlap each other in memory.
        RuntimeError: the backend asked for can't be used, or not for these tensors.
    """
    pin = backends.pinned(backend)
    groups, refusals = _inspect(averaged, source, names, pin)
    if arithmetic != "lerp" and pin is None:
        _leave_to_foreach(averaged, source, only_copy, groups, refusals)

    moved = [i for i in refusals if averaged[i].device != source[i].device]
    for i in moved:
        del refusals[i]
    if refusals and pin in ("cpu", "cuda"):
        i, reason = next(iter(refusals.items()))
        raise RuntimeError(
            f"backend {pin!r} was asked for and can't serve {label(i, names)}: {reason}; "
            f"leave backend unset to let torch update such pairs"
        )
    if refusals and pin is None:
        counts = Counter(refusals.values())
        for reason, count in counts.items():
            first = next(i for i in refusals if refusals[i] == reason)
            backends.warn_slow_path(reason, label(first, names), count, len(averaged))

    def pick(indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[bool]]:
        return (
            [averaged[i] for i in indices],
            [source[i] for i in indices],
            [only_copy[i] for i in indices],
        )

    parts: list[Part] = [
        NativePart(name, *pick(indices), arithmetic, indices, names)
        for name, indices in groups.items()
    ]
    if moved:
        parts.append(MovedPart(*pick(moved), arithmetic, moved, pin))
    if refusals:
        parts.append(ForeachPart(*pick(list(refusals)), arithmetic, list(refusals)))
    return parts


def _inspect(
    averaged: list[Tensor],
    source: list[Tensor],
    names: Sequence[str] | None,
    pin: str | None,
) -> tuple[dict[str, list[int]], dict[int, str]]:
    """(pairs with a native kernel, by device; the others, each with its reason)."""
    native = backends.native()
    groups: dict[str, list[int]] = {}
    refusals: dict[int, str] = {}
    if native is None or pin == "foreach":
        reason = backends.why_not("cpu") or "it was asked for"
        refusals = dict.fromkeys(range(len(averaged)), reason)
    else:
        refused, devices = native.inspect(averaged, source)
        refusals = dict(refused)
        for kind, index, indices in devices:
            name = {_DLPACK_CPU: "cpu", _DLPACK_CUDA: f"cuda:{index}"}.get(kind)
            device = averaged[indices[0]].device
            refusal = backends.why_not_on(device)
            if refusal is None and pin is not None and pin != device.type:
                refusal = f"it is on {device}"
            if name is None or refusal is not None:
                refusals |= dict.fromkeys(indices, refusal or f"no kernel is built for {device}")
            else:
                groups[name] = indices
        refusals = dict(sorted(refusals.items()))
    for i in refusals:
        check_pair(averaged[i], source[i], label(i, names))
    return groups, refusals


def _leave_to_foreach(
    averaged: list[Tensor],
    source: list[Tensor],
    only_copy: list[bool],
    groups: dict[str, list[int]],
    refusals: dict[int, str],
) -> None:
    """Moves 16-bit pairs whose original rounds by position from the CPU kernel to foreach."""
    halves = (torch.float16, torch.bfloat16)
    kept = []
    for i in groups.get("cpu", []):
        a, s = averaged[i].dtype, source[i].dtype
        if a == s and a in halves and not only_copy[i]:
            refusals[i] = _ROUNDS_BY_POSITION
        else:
            kept.append(i)
    if "cpu" in groups:
        groups["cpu"] = kept
        if not kept:
            del groups["cpu"]
