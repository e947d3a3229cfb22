"""Recognises a model by its parts."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

from torch import nn

from ema_fused.modules.watch import ModuleWatch


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _has_tensors(module: nn.Module) -> bool:
    """Whether it has parameters or buffers itself, not just in its children."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None for tensor in own)


class KnownModel:
    """Recognises a model by its parts, even if it is a new object at each update.

    For example, a training loop may make ``nn.Sequential(backbone, neck)`` in each step. The parts
    are the children; a model that has parameters or buffers itself is its only part. Parts are held
    by weak references.

    Args:
        when_a_part_is_gone: called when one of the parts is garbage-collected.

    Attributes:
        slots: the compiled watch of the model's own slots, without those of its children; None
            without the extension, and when the model is gone.
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
        # The watch keeps the children alive, so it is dropped together with the model.
        watch = ModuleWatch(alone=[model])
        self.slots = watch.slots
        self.slots_changed = watch.changed
        # Not a bound method: the reference cycle would keep all of it alive until a collection.
        self._present = weakref.ref(model, functools.partial(_forget, weakref.ref(self)))

    def is_now(self, model: nn.Module) -> bool:
        """Whether ``model`` is the same object, or consists of the same parts."""
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
        """The model that :meth:`is_now` accepted last; None if it has been garbage-collected."""
        return self._present()

    def present(self) -> nn.Module:
        """The same, for callers that hold the model, so that it still exists."""
        model = self._present()
        assert model is not None
        return model


def _forget(known: weakref.ref[KnownModel], _: object) -> None:
    known_model = known()
    if known_model is not None:
        known_model.slots = None
        known_model.slots_changed = lambda: True
