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


class _Broken:
    """A tensor's stand-in without a shard."""

    @property
    def _local_tensor(self) -> object:
        raise LookupError("no shard")


def test_what_cannot_be_watched_raises_and_leaves_no_exception_behind() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the extension is not built")
    for given in (7, [], None, object()):
        with pytest.raises(TypeError, match="only dicts can be watched"):
            native.SlotWatch([{}, given], [])
    with pytest.raises(LookupError, match="no shard"):
        native.SlotWatch([{}], [_Broken()])
    with pytest.raises(AttributeError, match="_local_tensor"):
        native.SlotWatch([{}], [object()])


def test_an_error_while_asking_is_raised_as_it_is() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the extension is not built")

    class Key(str):
        """Unequal to itself only when asked: as keys of users may be."""

        __slots__ = ()
        raises = False

        def __hash__(self) -> int:
            if Key.raises:
                raise LookupError("no hash")
            return 1

        def __eq__(self, other: object) -> bool:
            return self is other

    class Sharded:
        def __init__(self) -> None:
            self._local_tensor = object()

    slots: dict[Any, Any] = {Key("weight"): 1}
    watched = native.SlotWatch([slots], [])
    slots["bias"] = 2
    del slots["bias"]
    Key.raises = True
    try:
        with pytest.raises(LookupError, match="no hash"):
            watched.changed()
    finally:
        Key.raises = False
    assert not watched.changed()

    sharded = Sharded()
    watched = native.SlotWatch([{}], [sharded])
    assert not watched.changed()
    del sharded._local_tensor
    with pytest.raises(AttributeError, match="_local_tensor"):
        watched.changed()
