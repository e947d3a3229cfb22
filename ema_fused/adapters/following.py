"""The pairing of a wrapper's averaged module with the model it follows, kept from call to call.

Kept here and not in the wrapper: a wrapper is copied, pickled, and given our class in the middle of
its life.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection

from torch import nn

from ema_fused.pairing import Kind, Pairing

_pairings: weakref.WeakKeyDictionary[object, Pairing] = weakref.WeakKeyDictionary()


def pairing_of(
    wrapper: object,
    averaged: nn.Module,
    model: nn.Module,
    *,
    update_buffers: bool,
    arithmetic: str = "lerp",
    leave: Collection[Kind] = (),
    caches_are_buffers: bool = False,
) -> Pairing:
    """The pairing that ``wrapper`` updates ``averaged`` by; made anew where modules have changed.

    The options must be the same at each call for one wrapper, but for ``update_buffers``.

    Raises:
        KeyError, ValueError, TypeError: as :class:`~ema_fused.pairing.Pairing`.
    """
    pairing = _pairings.get(wrapper)
    owner = weakref.ref(wrapper)

    def let_go(_: object) -> None:
        """The pairing would keep the tensors of a deleted model alive."""
        living = owner()
        if living is not None:
            _pairings.pop(living, None)

    if pairing is None or not pairing.holds(averaged, model, update_buffers):
        pairing = Pairing(
            averaged,
            model,
            update_buffers=update_buffers,
            arithmetic=arithmetic,
            leave=leave,
            caches_are_buffers=caches_are_buffers,
            when_one_is_gone=let_go,
        )
        _pairings[wrapper] = pairing
    return pairing
