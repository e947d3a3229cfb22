"""What is known of a wrapper from call to call: its pairing with a model, the numbers it counts.

Kept here and not in the wrapper: a wrapper is copied, pickled, and given our class in the middle of
its life.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable
from typing import Any, NotRequired, TypedDict

import torch
from torch import nn

from ema_fused.averages.known_integer import KnownInteger
from ema_fused.modules.module_pairs import Kind
from ema_fused.modules.pairing import Pairing

_notes: weakref.WeakKeyDictionary[object, dict[str, Any]] = weakref.WeakKeyDictionary()


class Options(TypedDict):
    """Those arguments of a :class:`~ema_fused.modules.pairing.Pairing` in which wrappers differ."""

    arithmetic: str
    rounding: NotRequired[str]
    leave: NotRequired[Collection[Kind]]
    caches_are_buffers: NotRequired[bool]


def notes_of(wrapper: object) -> dict[str, Any]:
    """Where to note what is known of ``wrapper``: neither copied with it nor saved.

    Nothing in it may hold the wrapper itself, which would never be freed then.
    """
    return _notes.setdefault(wrapper, {})


def known_integer(wrapper: object, name: str) -> KnownInteger:
    """The one for the buffer ``name`` of ``wrapper``.

    Writing through ``buffer.data`` isn't seen, as nothing counts it; ``buffer.fill_()`` is.
    """
    known = notes_of(wrapper).setdefault(name, KnownInteger())
    assert isinstance(known, KnownInteger)
    return known


def is_scripted(*modules: nn.Module) -> bool:
    """Whether one is compiled by TorchScript, which hands out new tensors each time it is asked."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in modules)


def pairing_of(
    wrapper: object,
    averaged: nn.Module,
    model: nn.Module,
    *,
    update_buffers: bool,
    options: Callable[[], Options],
    made_for: Hashable = None,
) -> Pairing:
    """The pairing that ``wrapper`` updates ``averaged`` by; made anew where modules have changed.

    Args:
        options: asked when a pairing is made.
        made_for: what the options depend on; where it has changed, a pairing is made anew.

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

    def let_go(_: object) -> None:
        """The pairing would keep the tensors of a deleted model alive."""
        living = owner()
        if living is not None:
            notes_of(living).pop("pairing", None)

    pairing = Pairing(
        averaged,
        model,
        update_buffers=update_buffers,
        when_one_is_gone=let_go,
        **options(),
    )
    notes.update(pairing=pairing, made_for=made_for)
    return pairing
