"""Watches modules: are their parameters, buffers and children still the same objects?

Walking a module for its named parameters takes longer than updating their average, so it is done
only when one of these objects has been replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_not
from typing import Any

from torch import Tensor, nn

from ema_fused.engine import backends
from ema_fused.engine.dtensors import is_sharded, shard_of


class _PythonSlotWatch:
    """The fallback for the compiled SlotWatch."""

    def __init__(self, dictionaries: list[dict[str, Any]], sharded: list[Tensor]) -> None:
        self._remembered = [(dictionary, dict(dictionary)) for dictionary in dictionaries]
        self._sharded = sharded
        self._shards = [*map(shard_of, sharded)]

    def changed(self) -> bool:
        for dictionary, remembered in self._remembered:
            if len(dictionary) != len(remembered):
                return True
            for name, value in remembered.items():
                if dictionary.get(name, self) is not value:
                    return True
        return any(map(is_not, map(shard_of, self._sharded), self._shards))


class ModuleWatch:
    """Tells whether any parameter, buffer or child of ``modules`` has been replaced.

    It detects replaced, added and removed objects, and DTensors whose shard was replaced. It
    doesn't detect new storage in the same tensor (``.data = ...``); a Plan does. It keeps the
    watched parameters, buffers and children alive, but not ``modules`` themselves.

    Args:
        modules: each watched with all its submodules.
        alone: modules watched without their submodules.

    Attributes:
        slots: the compiled SlotWatch, which knows all of it; None without the extension.
        changed: the function to ask. Not a method of this object, which would make a reference
            cycle where it is kept by what it watches.
    """

    def __init__(self, *modules: nn.Module, alone: Iterable[nn.Module] = ()) -> None:
        dictionaries: list[dict[str, Any]] = []
        parts = [part for root in modules for part in root.modules()]
        for module in (*parts, *alone):
            dictionaries += [module._parameters, module._buffers, module._modules]
        sharded = [
            tensor
            for dictionary in dictionaries
            for tensor in dictionary.values()
            if isinstance(tensor, Tensor) and is_sharded(tensor)
        ]
        native = backends.native()
        self.slots: Any = None if native is None else native.SlotWatch(dictionaries, sharded)
        watch: Any = self.slots or _PythonSlotWatch(dictionaries, sharded)
        self.changed: Callable[[], bool] = watch.changed
