"""Watches modules: are their parameters, buffers and children still the same objects?

Walking a module for its named parameters takes longer than updating their average, so it is done
only when one of these objects has been replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from ema_fused.engine import backends
from ema_fused.engine.dtensors import ShardWatch


class _Watch(Protocol):
    def changed(self) -> bool: ...


class _PythonSlotWatch:
    """The fallback for the compiled SlotWatch."""

    def __init__(self, dictionaries: list[dict[str, Any]]) -> None:
        self._remembered = [(dictionary, dict(dictionary)) for dictionary in dictionaries]

    def changed(self) -> bool:
        for dictionary, remembered in self._remembered:
            if len(dictionary) != len(remembered):
                return True
            for name, value in remembered.items():
                if dictionary.get(name, self) is not value:
                    return True
        return False


class ModuleWatch:
    """Tells whether any parameter, buffer or child of ``modules`` has been replaced.

    It detects replaced, added and removed objects, and DTensors whose shard was replaced. It
    doesn't detect new storage in the same tensor (``.data = ...``); a Plan does. It keeps the
    watched parameters, buffers and children alive, but not ``modules`` themselves.

    Args:
        modules: each watched with all its submodules.
        alone: modules watched without their submodules.
    """

    def __init__(self, *modules: nn.Module, alone: Iterable[nn.Module] = ()) -> None:
        dictionaries: list[dict[str, Any]] = []
        parts = [part for root in modules for part in root.modules()]
        for module in (*parts, *alone):
            dictionaries += [module._parameters, module._buffers, module._modules]
        native = backends.native()
        self._slots: _Watch = (
            _PythonSlotWatch(dictionaries) if native is None else native.SlotWatch(dictionaries)
        )
        self._shards = ShardWatch(
            tensor
            for dictionary in dictionaries
            for tensor in dictionary.values()
            if isinstance(tensor, Tensor)
        )
        # Looked up once, as it is called before every update. Not a bound method, which would make
        # a reference cycle.
        slots_changed, shards_changed = self._slots.changed, self._shards.changed
        self.changed: Callable[[], bool] = (
            (lambda: slots_changed() or shards_changed()) if self._shards else slots_changed
        )
