"""A model known again by its parts."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

from torch import nn

from ema_fused.modules.watch import ModuleWatch


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _has_tensors(module: nn.Module) -> bool:
    """Whether it has parameters or buffers of its own, not of its children."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None for tensor in own)


class KnownModel:
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
        # Not a bound method: it would hold itself and what it watches until a collection.
        self._present = weakref.ref(model, functools.partial(_forget, weakref.ref(self)))

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


def _forget(known: weakref.ref[KnownModel], _: object) -> None:
    known_model = known()
    if known_model is not None:
        known_model.slots_changed = lambda: True
