"""Watches modules: are their parameters, buffers and children still the same objects?

Walking a module for its named parameters takes longer than updating their average, so it is done
only when one of these objects has been replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_not
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from ema_fused.engine import backends
from ema_fused.engine.dtensors import is_sharded, shard_of


class Slots(Protocol):
    """The parameters, buffers or children of a module; those of TorchScript are no dict."""

    def items(self) -> Iterable[tuple[str, Any]]: ...


class _PythonSlotWatch:
    """The fallback for the compiled SlotWatch; the only one for slots that are no dict."""

    def __init__(self, slots: Iterable[Slots], sharded: list[Tensor]) -> None:
        self._remembered = [(each, dict(each.items())) for each in slots]
        self._sharded = sharded
        self._shards = [*map(shard_of, sharded)]

    def changed(self) -> bool:
        for slots, remembered in self._remembered:
            # TorchScript makes all items anew whenever one is asked for.
            now = slots if isinstance(slots, dict) else dict(slots.items())
            if len(now) != len(remembered):
                return True
            for name, value in remembered.items():
                if now.get(name, self) is not value:
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
        slots: the compiled SlotWatch, which knows all of it; None without the extension, and where
            parts are compiled by TorchScript.
        changed: the function to ask. Not a method of this object, which would make a reference
            cycle where it is kept by what it watches.
    """

    def __init__(self, *modules: nn.Module, alone: Iterable[nn.Module] = ()) -> None:
        dictionaries: list[Slots] = []
        others: list[Slots] = []
        sharded: list[Tensor] = []
        parts = [part for root in modules for part in root.modules()]
        for module in (*parts, *alone):
            slots: Slots
            for slots in (module._parameters, module._buffers, module._modules):
                (dictionaries if isinstance(slots, dict) else others).append(slots)
                sharded += [item for _, item in slots.items() if _is_sharded(item)]
        native = backends.native()
        watch_of: Any = _PythonSlotWatch if native is None else native.SlotWatch
        watch = watch_of(dictionaries, sharded)
        self.slots: Any = None if native is None or others else watch
        self.changed: Callable[[], bool] = watch.changed
        if others:
            the_others = _PythonSlotWatch(others, [])
            self.changed = lambda: watch.changed() or the_others.changed()


def _is_sharded(item: object) -> TypeGuard[Tensor]:
    return isinstance(item, Tensor) and is_sharded(item)
