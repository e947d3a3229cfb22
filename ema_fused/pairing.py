"""The tensors of an averaged module beside those of its model: found by name, checked, planned."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_fused.copying import FrozenShares
from ema_fused.naming import match_names
from ema_fused.plan import Plan
from ema_fused.watch import ModuleWatch


class Pair(NamedTuple):
    """An averaged tensor and its source. ``averages`` is False where it follows by copy."""

    name: str
    averaged: Tensor
    source: Tensor
    averages: bool
    number: int  # among all names: the same whatever of them is shared


class Pairs(NamedTuple):
    """``updated``: what an update writes. ``shared``: one memory on both sides, nothing to do."""

    updated: list[Pair]
    shared: list[Pair]


class Kind(enum.Enum):
    """What a module holds a tensor as."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CACHE = "non-persistent buffer"  # each module fills it for itself


class _Slot(NamedTuple):
    tensor: Tensor
    kind: Kind


def _slots(root: nn.Module, leave: Collection[Kind], caches_are_buffers: bool) -> dict[str, _Slot]:
    """Parameters and buffers but those to leave, by name; tied ones under each of their names."""
    slots = {}
    for path, module in root.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots[prefix + name] = _Slot(parameter, Kind.PARAMETER)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                is_cache = not caches_are_buffers and name in module._non_persistent_buffers_set
                slots[prefix + name] = _Slot(buffer, Kind.CACHE if is_cache else Kind.BUFFER)
    return {name: slot for name, slot in slots.items() if slot.kind not in leave}


def _numbers(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating-point"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype == torch.bool else "integer"


def pair_up(
    averaged: nn.Module,
    model: nn.Module,
    *,
    update_buffers: bool,
    shares: FrozenShares,
    leave: Collection[Kind] = (),
    caches_are_buffers: bool = False,
) -> Pairs:
    """The pairs of both modules, tied ones once; kinds to ``leave`` are as if they weren't there.

    Parameters are averaged, and with ``update_buffers`` the persistent buffers; what has no average
    (integers, bool) and all other buffers follow by copy. A non-persistent buffer without a partner
    of its shape and kind is left alone.

    Raises:
        KeyError: names don't match.
        ValueError: shapes differ.
        TypeError: one side is floating-point and the other isn't, or the like.
        Nothing has been changed then.
    """
    ours, theirs = (_slots(root, leave, caches_are_buffers) for root in (averaged, model))
    names = match_names(
        {name: slot.kind is not Kind.CACHE for name, slot in ours.items()},
        {name: slot.kind is not Kind.CACHE for name, slot in theirs.items()},
    )
    pairs: list[Pair] = []
    for number, (name, source_name) in enumerate(names.items()):
        slot, source = ours[name], theirs[source_name].tensor
        if slot.kind is Kind.CACHE and not _is_like(slot.tensor, source):
            continue
        _check(name, slot.tensor, source)
        wanted = slot.kind is Kind.PARAMETER or (update_buffers and slot.kind is Kind.BUFFER)
        has_average = _numbers(slot.tensor) in ("floating-point", "complex")
        pairs.append(Pair(name, slot.tensor, source, wanted and has_average, number))

    updated: dict[tuple[int, int], Pair] = {}
    shared: list[Pair] = []
    for pair in pairs:
        if shares.settle(pair.name, pair.averaged, pair.source):
            shared.append(pair)
        else:
            updated.setdefault((id(pair.averaged), id(pair.source)), pair)
    return Pairs(list(updated.values()), shared)


def _is_like(averaged: Tensor, source: Tensor) -> bool:
    return averaged.shape == source.shape and _numbers(averaged) == _numbers(source)


def _check(name: str, averaged: Tensor, source: Tensor) -> None:
    if averaged.shape != source.shape:
        raise ValueError(
            f"{name!r} has shape {tuple(averaged.shape)} in the average and {tuple(source.shape)} "
            f"in the model; equal shapes are expected. If the model was resized on purpose, build "
            f"a new average of it"
        )
    if _numbers(averaged) != _numbers(source):
        raise TypeError(
            f"{name!r} is {averaged.dtype} in the average and {source.dtype} in the model; "
            f"{_numbers(averaged)} and {_numbers(source)} tensors don't pair up. Convert the model "
            f"back, or build a new average of it"
        )


def plan_of(
    pairs: list[Pair],
    *,
    arithmetic: str = "lerp",
    rounding: str = "nearest",
    backend: str | None,
) -> Plan:
    """The plan that updates ``pairs``; errors name the parameters."""
    return Plan(
        [pair.averaged for pair in pairs],
        [pair.source for pair in pairs],
        arithmetic=arithmetic,
        only_copy=[not pair.averages for pair in pairs],
        backend=backend,
        names=[pair.name for pair in pairs],
        rounding=rounding,
        numbers=[pair.number for pair in pairs],
    )


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _has_tensors(module: nn.Module) -> bool:
    """Whether it has parameters or buffers of its own, not of its children."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None for tensor in own)


class _Model:
    """A model known by its parts, so that ``nn.Sequential(backbone, neck)``, made anew at each
    update, is one and the same.

    Its children are the parts, or itself where it has parameters or buffers of its own. None of
    them is kept alive.

    Args:
        when_a_part_is_gone: called once no one else holds one of the parts.
    """

    def __init__(self, model: nn.Module, when_a_part_is_gone: Callable[[object], object]) -> None:
        parts = {} if _has_tensors(model) else _children(model)
        self._type = type(model)
        self._children = {
            name: weakref.ref(child, when_a_part_is_gone) for name, child in parts.items()
        }
        self._alone = None if parts else weakref.ref(model, when_a_part_is_gone)
        self._remember(model)

    def _remember(self, model: nn.Module) -> None:
        # Its slots hold its children: watched only as long as it lives.
        self.slots_changed = ModuleWatch(alone=[model]).changed
        self._present = weakref.ref(model, self._forget)

    def _forget(self, _: object) -> None:
        self.slots_changed = lambda: True

    def is_now(self, model: nn.Module) -> bool:
        """Whether ``model`` is the one, or made of the same parts."""
        if model is self._present():
            return not self.slots_changed()
        if self._alone is not None or type(model) is not self._type:
            return False
        if _has_tensors(model) or not self.has_the_parts_of(model):
            return False
        self._remember(model)
        return True

    def has_the_parts_of(self, model: nn.Module) -> bool:
        children = _children(model)
        return children.keys() == self._children.keys() and all(
            known() is children[name] for name, known in self._children.items()
        )

    def last(self) -> nn.Module | None:
        """The model that :meth:`is_now` has accepted last; None once it is gone."""
        return self._present()

    def present(self) -> nn.Module:
        """The same, where a caller has it at hand."""
        model = self._present()
        assert model is not None
        return model


class Pairing:
    """What an averaged module does with one model: prepared once, run at every update.

    Follows the tensors: :meth:`holds` tells when slots hold other objects; tensors that got another
    dtype in place (``module.double()``) are paired anew when a plan refuses them.

    The plans hold the tensors of both: whoever holds a pairing lets it go when a module is gone.

    Args:
        averaged: the module with the averages; not kept alive.
        model: the module they are averages of; not kept alive.
        when_one_is_gone: called once no one else holds ``averaged`` or ``model``.
        leave: kinds of tensors that are neither averaged nor copied.
        caches_are_buffers: treat non-persistent buffers as the others.
        update_buffers: whether persistent floating-point buffers are averaged too.
        arithmetic: of the averages, as in :class:`~ema_fused.Plan`; ``rounding`` too.
        backend: as in :class:`~ema_fused.Plan`.
        shares: the parameters that share memory with ``model``.

    Raises:
        KeyError, TypeError: as :func:`pair_up` and the plan, from every method too.
        ValueError: also where a trainable parameter is the average's own memory.
    """

    def __init__(
        self,
        averaged: nn.Module,
        model: nn.Module,
        *,
        update_buffers: bool,
        arithmetic: str,
        rounding: str = "nearest",
        backend: str | None = None,
        shares: FrozenShares | None = None,
        when_one_is_gone: Callable[[object], object] | None = None,
        leave: Collection[Kind] = (),
        caches_are_buffers: bool = False,
    ) -> None:
        self.update_buffers = update_buffers
        gone = when_one_is_gone or _nothing
        self._averaged = weakref.ref(averaged, gone)
        self._model = _Model(model, gone)
        self._arithmetic = arithmetic
        self._rounding = rounding
        self._backend = backend
        self._shares = FrozenShares() if shares is None else shares
        self._leave = leave
        self._caches_are_buffers = caches_are_buffers
        self._prepare()

    def _prepare(self) -> None:
        averaged, model = self._averaged(), self._model.present()
        assert averaged is not None, "it is at hand wherever it is used"
        inside = [part for part in model.modules() if part is not model]
        slots_changed = ModuleWatch(averaged, alone=inside).changed
        pairs, shared = pair_up(
            averaged,
            model,
            update_buffers=self.update_buffers,
            shares=self._shares,
            leave=self._leave,
            caches_are_buffers=self._caches_are_buffers,
        )
        everything = plan_of(
            pairs, arithmetic=self._arithmetic, rounding=self._rounding, backend=self._backend
        )
        for pair in pairs:
            _check_own_memory(pair)
        # Nothing above is kept if any of it has raised.
        self._slots_changed = slots_changed
        self._pairs = pairs
        self._shared = [(pair.averaged, pair.source) for pair in shared]
        self._everything = everything
        self._followers: Plan | None = None
        rounded = pairs if self._rounding == "nearest" else []
        halves = {pair.averaged.dtype for pair in rounded if _is_half(pair)}
        # With a smaller weight, half a unit in the last place is more than a whole new value moves.
        self.lossy_below = max((torch.finfo(dtype).eps / 2 for dtype in halves), default=0.0)

    def holds(self, averaged: nn.Module, model: nn.Module, update_buffers: bool) -> bool:
        """Whether the pairs are still those of these modules: some nanoseconds a slot."""
        if averaged is not self._averaged() or not self._model.is_now(model):
            return False
        if update_buffers != self.update_buffers:
            return False
        if self._slots_changed():
            return False
        for alias, source in self._shared:
            if source.requires_grad or alias.data_ptr() != source.data_ptr():
                return False
        return True

    def difference(self, other: Pairing) -> str:
        """What distinguishes this pairing from ``other``, an earlier one."""
        model = self._model.present()
        if model is not other._model.last() and not other._model.has_the_parts_of(model):
            return "another model object is passed in turn"
        known = {pair.name: pair for pair in other._pairs}
        for pair in self._pairs:
            before = known.get(pair.name)
            if before is None or pair.averaged is not before.averaged:
                return f"{pair.name!r} of the average is replaced"
            if pair.source is not before.source:
                return f"{pair.name!r} of the model is replaced by a new tensor"
        return "modules or frozen parameters are replaced"

    def copy_(self) -> None:
        """Copies every source into its average."""
        try:
            return self._everything.copy_()
        except ValueError:
            pass
        self._prepare()
        self._everything.copy_()

    def average_(
        self, weight: float, *, seed: int = 0, step: int = 0, found_inf: Tensor | None = None
    ) -> None:
        """Averages what has an average and copies the rest, in one launch a device.

        ``seed`` and ``step`` are those of stochastic rounding; where ``found_inf`` is set, nothing
        is done.
        """
        try:
            return self._average(weight, seed, step, found_inf)
        except ValueError:
            pass
        self._prepare()
        self._average(weight, seed, step, found_inf)

    def _average(self, weight: float, seed: int, step: int, found_inf: Tensor | None) -> None:
        if self._rounding == "stochastic":
            self._everything.load_state_dict({"seed": seed, "step": step})
        self._everything.lerp_(weight, found_inf=found_inf)

    def follow_(self) -> None:
        """Copies only what isn't averaged."""
        if self._followers is not None:
            try:
                return self._followers.copy_()
            except ValueError:
                self._prepare()
        followers = [pair for pair in self._pairs if not pair.averages]
        self._followers = plan_of(followers, backend=self._backend)
        self._followers.copy_()

    def averaging_pairs(self) -> list[Pair]:
        """The pairs to average, their shapes known to be equal."""
        pairs = [pair for pair in self._pairs if pair.averages]
        if all(pair.averaged.shape == pair.source.shape for pair in pairs):
            return pairs
        self._prepare()
        return [pair for pair in self._pairs if pair.averages]


def _nothing(_: object) -> None:
    pass


def _is_half(pair: Pair) -> bool:
    return pair.averages and pair.averaged.is_floating_point() and pair.averaged.itemsize <= 2


def _check_own_memory(pair: Pair) -> None:
    """An average in its model's own memory would look right and never average anything."""
    name, averaged, source, averages, _ = pair
    if not averages or not source.requires_grad or averaged.device != source.device:
        return
    if averaged.numel() and averaged.data_ptr() == source.data_ptr():
        raise ValueError(
            f"{name!r} of the average is the model's own memory, so it can't differ from it; give "
            f"the average tensors of its own (load_state_dict(..., assign=True) takes over the "
            f"tensors that it is given: pass it a deep copy)"
        )
