"""Carries the averages of a module over to one of another structure, made of the changed model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.engine.dtensors import is_sharded, local
from ema_fused.modules.choosing import Buffers
from ema_fused.modules.module_pairs import (
    Kind,
    Slot,
    has_average,
    is_averaged,
    numbers_of,
    slots_of,
)
from ema_fused.modules.naming import common_names
from ema_fused.modules.parametrized import carry_computed
from ema_fused.modules.sharding import converted as converted_to

Resize = Callable[[str, Tensor, Tensor], Tensor]


class Adopted(NamedTuple):
    """What ``adopt`` did; tied tensors are named under each of their names.

    Attributes:
        kept: how many tensors kept their average.
        started: names of new ones, or of another kind, which start with the model's values.
        resized: names of those whose shape has changed.
        dropped: names that the model has lost, and the average now too.
        converted: names of those whose average follows from others': a parametrization was put on
            or taken off.
    """

    kept: int
    started: list[str]
    resized: list[str]
    dropped: list[str]
    converted: list[str]


def carry_over(
    new: nn.Module,
    shared: set[str],
    old: nn.Module,
    shared_before: set[str],
    *,
    resize: Resize | None,
    update_buffers: Buffers,
    pinned: bool = False,
    left_out: Collection[str] = (),
) -> Adopted:
    """Puts the averages of ``old`` into ``new``, a fresh average of the changed model.

    Tensors of one name, shape and kind are taken over themselves. ``old`` isn't changed; ``new``
    is, also if an error is raised.

    Args:
        shared: names in ``new`` of parameters that share the model's memory; those that keep an
            average of their own are removed.
        shared_before: the same in ``old``.
        resize: makes the average of a tensor whose shape has changed, given its name, its old
            average and the model's value; None: the model's value is taken.
        update_buffers: which buffers are averaged too.
        pinned: new tensors are in host memory, pinned if CUDA is available.
        left_out: names in ``new`` of parameters that aren't averaged; they keep the model's values.

    Raises:
        TypeError, ValueError: ``resize`` didn't return a tensor of the new shape and kind, or the
            tensor is sharded.
    """
    slots, slots_before = slots_of(new), slots_of(old)
    common = common_names(slots, slots_before)
    before = {name: slots_before[partner] for name, partner in common.items()}
    tied: dict[int, list[str]] = {}
    for name, slot in slots.items():
        tied.setdefault(id(slot.tensor), []).append(name)

    taken: set[int] = set()
    for group in tied.values():
        name, slot = group[0], slots[group[0]]
        if name in left_out:
            continue
        own = [n for n in group if n in before and common[n] not in shared_before]
        own = [n for n in own if _is_alike(slot, before[n])]
        equal = next((n for n in own if before[n].tensor.shape == slot.tensor.shape), None)
        averages = is_averaged(name, slot, update_buffers)
        tensor = slot.tensor
        if equal is not None:
            tensor = before[equal].tensor
            if id(tensor) in taken:  # tied in the old average alone
                tensor = _registered(converted_to(tensor, None, None, pinned=pinned), slot)
            taken.add(id(tensor))
            shared.difference_update(group)
        elif own and averages and name not in shared:
            tensor = _resized(own[0], slot, before[own[0]].tensor, resize, pinned=pinned)
        for each in group:
            _place(tensor, slots[each])

    unknown = {name for name in slots if name not in before and name not in shared}
    converted = carry_computed(new, old, unknown)
    started, resized, kept = [], [], 0
    for name, slot in slots_of(new).items():
        if name in converted:
            continue
        if name not in before or not _is_alike(slot, before[name]):
            started.append(name)
        elif slot.tensor.shape != before[name].tensor.shape:
            resized.append(name)
        else:
            kept += 1
    partners = set(common.values())
    dropped = [name for name in slots_before if name not in partners]
    return Adopted(kept, started, resized, dropped, converted)


def _is_alike(slot: Slot, before: Slot) -> bool:
    """Whether an average in ``before`` can go on in ``slot``, apart from its shape."""
    tensor, other = slot.tensor, before.tensor
    if is_lazy(tensor) or is_lazy(other) or numbers_of(tensor) != numbers_of(other):
        return False
    if local(other).is_meta and not local(tensor).is_meta:
        return False
    if (slot.kind is Kind.PARAMETER) != (before.kind is Kind.PARAMETER):
        return False
    if not is_sharded(tensor) or not is_sharded(other):
        return is_sharded(tensor) == is_sharded(other)
    places: list[Any] = [(t.device_mesh, tuple(t.placements)) for t in (tensor, other)]  # type: ignore[attr-defined]
    return bool(places[0] == places[1])


def _registered(tensor: Tensor, slot: Slot) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if slot.kind is Kind.PARAMETER else tensor


def _place(tensor: Tensor, slot: Slot) -> None:
    slots: dict[str, Any] = (
        slot.owner._parameters if slot.kind is Kind.PARAMETER else slot.owner._buffers
    )
    slots[slot.key] = tensor


def _resized(name: str, slot: Slot, old: Tensor, resize: Resize | None, *, pinned: bool) -> Tensor:
    """The average of a tensor whose shape has changed, where and in which dtype it was before."""
    value = slot.tensor.detach()
    if resize is not None and has_average(old):
        if is_sharded(old):
            raise TypeError(
                f"{name!r} is a DTensor, and resize= gets whole tensors; leave it out, and the "
                f"average of what was resized starts with the model's values"
            )
        # Clones: whatever the function does to them, nothing has changed if it raises.
        value = resize(name, old.detach().clone(), value.clone())
        if not isinstance(value, Tensor) or numbers_of(value) != numbers_of(old):
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"resize= returned {found} for {name!r}; a {numbers_of(old)} tensor is expected"
            )
        if value.shape != slot.tensor.shape:
            raise ValueError(
                f"resize= returned a tensor of shape {tuple(value.shape)} for {name!r}; the "
                f"model's shape is expected: {tuple(slot.tensor.shape)}"
            )
    device = None if local(value).is_meta else old.device
    return _registered(converted_to(value, device, old.dtype, pinned=pinned), slot)
