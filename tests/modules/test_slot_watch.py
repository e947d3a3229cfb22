"""Whether dictionaries still hold what they held: the compiled watch, and the one in its place."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ema_fused.engine import backends
from ema_fused.modules.watch import _PythonSlotWatch

Slots = dict[str, Any]


class Item:
    """Something that can be held."""


def _compiled(dictionaries: list[Slots]) -> Any:
    native = backends.native()
    if native is None:
        pytest.skip("the extension is not built")
    return native.SlotWatch(dictionaries, [])


def _in_python(dictionaries: list[Slots]) -> Any:
    return _PythonSlotWatch(dictionaries, [])


WATCHES = pytest.mark.parametrize("watch", [_compiled, _in_python])


def dictionaries() -> list[Slots]:
    return [{"weight": Item(), "bias": Item()}, {}, {"child": Item()}]


def _replace(slots: list[Slots]) -> None:
    slots[0]["bias"] = Item()


def _remove(slots: list[Slots]) -> None:
    del slots[2]["child"]


def _add(slots: list[Slots]) -> None:
    slots[1]["buffer"] = None


def _rename(slots: list[Slots]) -> None:
    slots[0]["other"] = slots[0].pop("weight")


def _exchange(slots: list[Slots]) -> None:
    slots[0].update(weight=slots[0]["bias"], bias=slots[0]["weight"])


def _clear(slots: list[Slots]) -> None:
    slots[0].clear()


@WATCHES
@pytest.mark.parametrize("change", [_replace, _remove, _add, _rename, _exchange, _clear])
def test_every_change_is_told_until_it_is_taken_back(
    watch: Callable[[list[Slots]], Any], change: Callable[[list[Slots]], None]
) -> None:
    slots = dictionaries()
    before = [dict(one) for one in slots]
    watched = watch(slots)
    assert not watched.changed()
    change(slots)
    assert watched.changed() and watched.changed()
    for one, held in zip(slots, before, strict=True):
        one.clear()
        one.update(held)
    assert not watched.changed()
    change(slots)
    assert watched.changed()


@WATCHES
def test_a_dictionary_may_be_watched_more_than_once(watch: Callable[[list[Slots]], Any]) -> None:
    slots = dictionaries()
    first, second, third = watch(slots), watch(slots[:1]), watch(slots[1:])
    del first
    gc.collect()
    _replace(slots)
    assert second.changed() and not third.changed()
    _add(slots)
    assert third.changed()


@WATCHES
def test_what_is_watched_stays_alive_as_long_as_the_watch(
    watch: Callable[[list[Slots]], Any],
) -> None:
    slots = dictionaries()
    watched = watch(slots)
    child = weakref.ref(slots[2]["child"])
    slots[2].clear()
    gc.collect()
    assert child() is not None and watched.changed()
    del watched
    gc.collect()
    assert child() is None
