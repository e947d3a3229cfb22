"""State of a wrapper between calls: its pairing or plan with a model, and its counters' values.

Kept here and not in the wrapper, because wrappers are copied and pickled, and may get our class
only after they were made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable
from typing import Any, NotRequired, TypedDict

from torch import nn

from ema_fused.averages.known_integer import KnownInteger
from ema_fused.engine.plan import Plan
from ema_fused.modules.module_pairs import Kind
from ema_fused.modules.pairing import Pairing
from ema_fused.modules.watch import ModuleWatch

_notes: weakref.WeakKeyDictionary[object, dict[str, Any]] = weakref.WeakKeyDictionary()


class Options(TypedDict):
    """The arguments of :class:`~ema_fused.modules.pairing.Pairing` that differ between wrappers."""

    arithmetic: str
    rounding: NotRequired[str]
    leave: NotRequired[Collection[Kind]]
    caches_are_buffers: NotRequired[bool]


def notes_of(wrapper: object) -> dict[str, Any]:
    """The state of ``wrapper`` as a dict, which is neither copied nor saved with it.

    Nothing in it may refer to the wrapper, which would then never be garbage-collected.
    """
    return _notes.setdefault(wrapper, {})


def known_integer(wrapper: object, name: str) -> KnownInteger:
    """The :class:`KnownInteger` for the buffer ``name`` of ``wrapper``.

    It detects ``buffer.fill_()``, but not writes through ``buffer.data``, which don't increment the
    version counter.
    """
    known = notes_of(wrapper).setdefault(name, KnownInteger())
    assert isinstance(known, KnownInteger)
    return known


def pairing_of(
    wrapper: object,
    averaged: nn.Module,
    model: nn.Module,
    *,
    update_buffers: bool,
    options: Callable[[], Options],
    made_for: Hashable = None,
) -> Pairing:
    """The pairing by which ``wrapper`` updates ``averaged``; a new one if modules have changed.

    Args:
        options: called when a pairing is made.
        made_for: the values that the options depend on; if they have changed, a new pairing is
            made.

    Raises:
        KeyError, ValueError, TypeError: as :class:`~ema_fused.modules.pairing.Pairing`.
    """
    notes = notes_of(wrapper)
    pairing = notes.get("pairing")
    if (
        isinstance(pairing, Pairing)
        and notes["made_for"] == made_for
        and pairing.holds(averaged, model, update_buffers)
    ):
        return pairing
    owner = weakref.ref(wrapper)

    def drop_pairing(_: object) -> None:
        """Drops the pairing, which would keep the tensors of a deleted model alive."""
        living = owner()
        if living is not None:
            notes_of(living).pop("pairing", None)

    pairing = Pairing(
        averaged,
        model,
        update_buffers=update_buffers,
        when_one_is_gone=drop_pairing,
        **options(),
    )
    notes.update(pairing=pairing, made_for=made_for)
    return pairing


class KeptPlan:
    """A plan of two modules' tensors, valid as long as modules and options don't change.

    Args:
        averaged, model: the modules; not kept alive, but their tensors are.
        make: makes the plan of the two.
        made_for: the values that the plan depends on.
    """

    def __init__(
        self,
        averaged: nn.Module,
        model: nn.Module,
        make: Callable[[nn.Module, nn.Module], Plan],
        *,
        made_for: object = None,
    ) -> None:
        self._modules = weakref.ref(averaged), weakref.ref(model)
        self._made_for = made_for
        self._changed = ModuleWatch(averaged, model).changed
        self.plan = make(averaged, model)

    def holds(self, averaged: nn.Module, model: nn.Module, made_for: object = None) -> bool:
        """Whether it is the plan of these modules as they are now, made for equal values."""
        is_same = averaged is self._modules[0]() and model is self._modules[1]()
        return is_same and made_for == self._made_for and not self._changed()
