"""The numbers in the names of checkpoints, and the order that they tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\d+")
_WHOLE = re.compile(r"(?<!\d)(?<!\d\.)\d+(?!\d)(?!\.\d)")  # no loss or width, as 0.42
# Behind the first of these words is the number that counts: epoch=1-step=500-val_loss=0.42.
_WORDS = tuple(
    re.compile(rf"{word}s?[^0-9a-z]*(\d+)", re.IGNORECASE)
    for word in ("step", "iter(?:ation)?", "epoch")
)


def kind_of(name: str) -> str:
    """The name with ``*`` for each number: what the checkpoints of one run share."""
    return _NUMBER.sub("*", name)


def number_in(name: str) -> int | None:
    """The number of a step, iteration or epoch, or else the last; None: there is none."""
    for word in (*_WORDS, _WHOLE, _NUMBER):
        found = word.findall(name)
        if found:
            return int(found[-1])
    return None


def numbers_of(names: Sequence[str]) -> list[tuple[int, ...]]:
    """What names of one kind are ordered by.

    The number of the step, iteration or epoch; or else the last one that isn't the same in several,
    as a seed behind it is; or else all of them.
    """
    for word in _WORDS:
        found = [word.findall(name) for name in names]
        if all(found) and _are_distinct(last := [int(one[-1]) for one in found]):
            return [(number,) for number in last]
    every = [tuple(map(int, _WHOLE.findall(name))) for name in names]
    for column in reversed(list(zip(*every, strict=True))):
        if _are_distinct(column):
            return [(number,) for number in column]
    return every


def is_in_order_of_text(names: Sequence[str]) -> bool:
    """Whether a shell could have listed them so: step-1000 before step-200."""
    plain = [re.sub(r"[^0-9a-z]", "", name.lower()) for name in names]  # some locales sort so
    return list(names) == sorted(names) or plain == sorted(plain)


def _are_distinct(numbers: Sequence[int]) -> bool:
    return len(set(numbers)) == len(numbers)
