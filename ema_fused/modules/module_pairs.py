"""Pairs the tensors of an averaged module with those of its model, by name, and checks them."""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.engine.dtensors import check_placed_alike, local
from ema_fused.engine.plan import Plan
from ema_fused.modules.choosing import Buffers, is_chosen
from ema_fused.modules.copying import FrozenShares, is_view_of
from ema_fused.modules.kept_elsewhere import Kept, KeptElsewhere
from ema_fused.modules.merged_adapters import refuse_merged
from ema_fused.modules.naming import match_names, named_once, without_wrappers
from ema_fused.modules.shared_parameter import has_own_class, shared
from ema_fused.modules.sources import Sources


class Kind(enum.Enum):
    """How a module registers a tensor."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CACHE = "non-persistent buffer"  # each module computes its own


class Pair(NamedTuple):
    """An averaged tensor and its source; for DTensors, their shards in this process.

    ``held`` are the two as the modules hold them, DTensors themselves.
    """

    name: str
    averaged: Tensor
    source: Tensor
    averages: bool  # False: it is copied
    number: int  # index among all names, shared ones included
    trains: bool  # whether the source requires a gradient
    kind: Kind
    held: tuple[Tensor, Tensor]
    of_another: bool = False  # left out, and the averaged side is another model's memory


class Pairs(NamedTuple):
    """``updated``: the pairs that an update writes. ``shared``: those whose two sides are the same
    memory, so that nothing is to be done (parameters themselves, not their shards).
    ``elsewhere``: the sources that the model itself doesn't hold.
    """

    updated: list[Pair]
    shared: list[Pair]
    elsewhere: list[Kept]


class Slot(NamedTuple):
    """Where a module holds a tensor."""

    tensor: Tensor
    kind: Kind
    owner: nn.Module
    key: str  # in the owner's parameters or buffers


def slots_of(
    root: nn.Module, leave: Collection[Kind] = (), caches_are_buffers: bool = False
) -> dict[str, Slot]:
    """Parameters and buffers by name, but not the kinds in ``leave``; tied ones under each name."""
    slots = {}
    modules = dict(root.named_modules(remove_duplicate=False))
    for path in named_once(modules):
        module = modules[path]
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots[prefix + name] = Slot(parameter, Kind.PARAMETER, module, name)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                is_cache = not caches_are_buffers and name in module._non_persistent_buffers_set
                kind = Kind.CACHE if is_cache else Kind.BUFFER
                slots[prefix + name] = Slot(buffer, kind, module, name)
    return {name: slot for name, slot in slots.items() if slot.kind not in leave}


def numbers_of(tensor: Tensor) -> str:
    """Which numbers it holds, in words."""
    if tensor.is_floating_point():
        return "floating-point"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype == torch.bool else "integer"


def partners(averaged: dict[str, Slot], model: dict[str, Slot]) -> dict[str, str]:
    """The model's name for each name of the average; caches need no partner.

    Tensors of the average itself that the model holds under other names (an adapter beside the one
    that is trained) have none.

    Raises:
        KeyError: names don't match.
    """
    held = own_in(averaged, model)
    ours, theirs = (
        {name: slot.kind is not Kind.CACHE for name, slot in slots.items() if name not in left_out}
        for slots, left_out in ((averaged, ()), (model, held))
    )
    return match_names(ours, theirs)


def own_in(averaged: dict[str, Slot], model: dict[str, Slot]) -> set[str]:
    """The names under which ``model`` holds tensors of its average, in an adapter of its own.

    With what else this adapter holds: tensors that the model has under names of the average.
    """
    names = {without_wrappers(name) for name in averaged}
    others = {name: slot for name, slot in model.items() if without_wrappers(name) not in names}
    own = {id(slot.tensor) for slot in averaged.values()} if others else set()
    if not any(id(slot.tensor) in own for slot in others.values()):
        return set()
    own |= {id(slot.tensor) for name, slot in model.items() if name not in others}
    return {name for name, slot in others.items() if id(slot.tensor) in own}


def refuse_own(
    averaged: nn.Module, model: nn.Module, why: str = "and can't be averaged too"
) -> None:
    """Raises ValueError if ``model`` holds tensors of its average under other names."""
    held = own_in(slots_of(averaged), slots_of(model))
    if held:
        raise ValueError(
            f"{min(held)!r} of the model is a tensor of the average itself "
            f"(add_averaged_adapter()), {why}; delete_adapter() it first, and add it again "
            f"afterwards"
        )


def is_averaged(name: str, slot: Slot, update_buffers: Buffers) -> bool:
    """Whether a tensor is averaged, if its dtype has an average; otherwise it is copied."""
    if slot.kind is Kind.BUFFER:
        is_sparse = slot.tensor.layout != torch.strided
        return not is_sparse and is_chosen(update_buffers, name, slot.tensor)
    return slot.kind is Kind.PARAMETER


def has_average(tensor: Tensor) -> bool:
    return numbers_of(tensor) in ("floating-point", "complex")


def names_of_buffers(model: nn.Module) -> list[str] | None:
    """The plain names of the buffers that can be averaged; None of a model without tensors."""
    slots = slots_of(model)
    if not slots:
        return None
    return [
        without_wrappers(name)
        for name, slot in slots.items()
        if slot.kind is Kind.BUFFER and has_average(slot.tensor)
    ]


def pair_up(
    averaged: nn.Module,
    model: nn.Module,
    *,
    update_buffers: Buffers,
    shares: FrozenShares,
    leave: Collection[Kind] = (),
    caches_are_buffers: bool = False,
    for_passes: bool = False,
    into_model: bool = False,
    sources: Sources | None = None,
) -> Pairs:
    """The pairs of both modules, tied ones once; kinds in ``leave`` are ignored.

    Parameters are averaged, and the persistent buffers of ``update_buffers``. Tensors that can't be
    averaged (integers, bool), sparse buffers, all other buffers and what ``shares`` leaves out are
    copied. A non-persistent buffer is left alone unless the model has one of its shape and kind.

    Args:
        for_passes: the sources are what the model's passes read, not what its optimizer steps on,
            where these are two (ZeRO-3's 16-bit and float32 partitions).
        into_model: the model is to be written. If it is another one than the average is of, the
            parameters that are left out and shared stay shared with that, and are among ``updated``
            (``of_another``).
        sources: what is averaged in place of the model's own tensors.

    Raises:
        KeyError: names don't match.
        ValueError: shapes or placements differ.
        TypeError: one side is floating-point (or complex, or sharded) and the other isn't, or
            ZeRO-3 keeps a parameter where it can't be averaged.
        RuntimeError: adapters of the model are merged into its weights.
        If an error is raised, nothing has been changed.
    """
    refuse_merged(model)
    ours, theirs = (slots_of(root, leave, caches_are_buffers) for root in (averaged, model))
    names = partners(ours, theirs)
    left_out = [names[name] for name in shares.left_out if name in names]
    kept = KeptElsewhere(model, for_passes=for_passes, sources=sources, left_out=left_out)
    pairs: list[Pair] = []
    of_model: list[Tensor] = []  # what the model itself holds
    aliases: dict[Tensor, nn.Parameter] = {}
    for number, (name, source_name) in enumerate(names.items()):
        slot, (its_own, _, owner, key) = ours[name], theirs[source_name]
        if slot.kind is Kind.CACHE and not _is_like(slot.tensor, its_own):
            continue
        source = kept.find(owner, key, its_own, source_name)
        of_another = into_model and shares.is_of_another(name, slot.tensor, source, its_own)
        if not of_another:
            slot = _follow_shared(name, slot, source, shares, aliases)
        if not (shares.share(name, source) and local(slot.tensor).is_meta) and (
            local(source).is_meta or local(slot.tensor).is_meta
        ):
            _refuse_offloaded(source_name, owner)
        _check(name, slot.tensor, source)
        averages = is_averaged(name, slot, update_buffers) and has_average(slot.tensor)
        averages = averages and not shares.leave_out(name)
        trains = source.requires_grad
        held = slot.tensor, source
        pairs.append(Pair(name, *held, averages, number, trains, slot.kind, held, of_another))
        of_model.append(its_own)

    updated: dict[tuple[int, int], Pair] = {}
    shared: list[Pair] = []
    for pair, its_own in zip(pairs, of_model, strict=True):
        if not pair.of_another and shares.settle(pair.name, pair.averaged, pair.source, its_own):
            shared.append(pair)
        else:
            in_shards = pair._replace(averaged=local(pair.averaged), source=local(pair.source))
            updated.setdefault((id(pair.averaged), id(pair.source)), in_shards)
    return Pairs(list(updated.values()), shared, kept.found)


def differ(averaged: nn.Module, model: nn.Module) -> bool:
    """Whether a parameter that trains has another value in ``averaged``.

    Looks at plain tensors with values alone, and waits for their devices.

    Raises:
        KeyError: names don't match.
    """
    leave = (Kind.BUFFER, Kind.CACHE)
    ours, theirs = slots_of(averaged, leave), slots_of(model, leave)
    for name, source_name in partners(ours, theirs).items():
        average, source = local(ours[name].tensor).detach(), local(theirs[source_name].tensor)
        if not source.requires_grad or is_lazy(ours[name].tensor) or average.is_meta:
            continue
        value = source.detach()
        if {type(average), type(value)} != {Tensor} or value.is_meta:
            continue
        if average.shape != value.shape:
            continue
        # A 16-bit weight is the rounded value of what an optimizer keeps.
        rounded = average.to(value.dtype) if average.itemsize > value.itemsize else average
        if not torch.equal(rounded, value.to(rounded)):
            return True
    return False


def _follow_shared(
    name: str,
    slot: Slot,
    source: Tensor,
    shares: FrozenShares,
    aliases: dict[Tensor, nn.Parameter],
) -> Slot:
    """Shares a parameter anew where the model's is another one now, if only a new one can be it:
    one of a class of its own, and one that is left out, for its version counter.

    Args:
        aliases: those made so far; tied parameters stay one.
    """
    leaves = shares.leave_out(name)
    if not shares.share(name, source) or not (leaves or has_own_class(source)):
        return slot
    if is_view_of(local(slot.tensor), local(source)):
        return slot
    if source not in aliases:
        aliases[source] = shared(source, trains=leaves)
    alias = slot.owner._parameters[slot.key] = aliases[source]
    return slot._replace(tensor=alias)


def _is_like(averaged: Tensor, source: Tensor) -> bool:
    return averaged.shape == source.shape and numbers_of(averaged) == numbers_of(source)


def _check(name: str, averaged: Tensor, source: Tensor) -> None:
    refuse_lazy(name, source, "model")
    refuse_lazy(name, averaged, "average")
    check_placed_alike(name, averaged, source)
    if averaged.shape != source.shape:
        raise ValueError(
            f"{name!r} has shape {tuple(averaged.shape)} in the average and {tuple(source.shape)} "
            f"in the model; equal shapes are expected. If the model was resized on purpose, "
            f"averaged.adopt(model) takes that over"
        )
    if numbers_of(averaged) != numbers_of(source):
        raise TypeError(
            f"{name!r} is {averaged.dtype} in the average and {source.dtype} in the model; "
            f"{numbers_of(averaged)} and {numbers_of(source)} tensors don't pair up. Convert "
            f"the model back, or call averaged.adopt(model)"
        )


def refuse_lazy(name: str, tensor: Tensor, side: str) -> None:
    """Raises ValueError for a tensor that a lazy layer will make in its first forward pass."""
    if is_lazy(tensor):
        raise ValueError(
            f"{name!r} of the {side} has no elements yet: it belongs to a lazy layer, which makes "
            f"them in its first forward pass. Run one batch through the model first"
        )


def refuse_untied(pairs: list[Pair]) -> None:
    """Raises ValueError for one averaged tensor of several sources, being tied on its side alone.

    Args:
        pairs: with each pair of tensors once.
    """
    names: dict[int, str] = {}
    for pair in pairs:
        other = names.setdefault(id(pair.averaged), pair.name)
        if other != pair.name:
            raise ValueError(
                f"{other!r} and {pair.name!r} are one tensor in the average and two in the model, "
                f"so they were tied and aren't any more; averaged.adopt(model) gives each an "
                f"average of its own"
            )


def _refuse_offloaded(name: str, owner: nn.Module) -> None:
    """Raises ValueError for a tensor on the meta device whose values accelerate keeps elsewhere."""
    if getattr(owner, "_hf_hook", None) is not None:
        raise ValueError(
            f"{name!r} of the model is on the meta device: accelerate keeps the weights of this "
            f"{type(owner).__name__} elsewhere between passes (cpu_offload, device_map). Average "
            f"the model by ema_fused.AveragedWeights if they are in host memory, or take it back: "
            f"accelerate.hooks.remove_hook_from_submodules(model); weights that aren't trained may "
            f"stay where they are with share_frozen=True"
        )


def lists_of(pairs: list[Pair]) -> dict[str, Any]:
    """The arguments of a plan for ``pairs``."""
    return {
        "averaged": [pair.averaged for pair in pairs],
        "source": [pair.source for pair in pairs],
        "only_copy": [not pair.averages for pair in pairs],
        "names": [pair.name for pair in pairs],
        "numbers": [pair.number for pair in pairs],
    }


def plan_of(pairs: list[Pair], *, backend: str | None) -> Plan:
    """The plan that updates ``pairs``; errors name the parameters."""
    return Plan(**lists_of(pairs), backend=backend)
