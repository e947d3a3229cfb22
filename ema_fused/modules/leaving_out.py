"""Which parameters are averaged: those that ``include`` names and ``exclude`` doesn't."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.modules import naming
from ema_fused.modules.choosing import Buffers, Pattern, compiled
from ema_fused.modules.module_pairs import Kind, has_average, is_averaged, slots_of
from ema_fused.modules.naming import without_wrappers

# Parameters in whose plain names a pattern is found, or for which a function of plain name and
# tensor is true.
Parameters = Pattern | Sequence[Pattern] | Callable[[str, Tensor], bool]


class Copied(NamedTuple):
    """A new average of a model.

    ``shared`` are the names of its parameters in the model's memory, ``left_out`` of those that
    aren't averaged, with the model's tensors of these.
    """

    module: nn.Module
    shared: set[str]
    left_out: dict[str, Tensor]


class Copy(Protocol):
    """:func:`~ema_fused.modules.copying.averaged_copy`, or ``averaged_skeleton``, with the other
    arguments bound.
    """

    def __call__(
        self, model: nn.Module, *, left_out: Collection[str]
    ) -> tuple[nn.Module, set[str]]: ...


class Selection:
    """The parameters to average, as a user names them.

    Args:
        include: what is averaged; None: everything.
        exclude: what isn't, of that; None: nothing.

    Raises:
        TypeError: one of them is neither patterns nor a function.
        ValueError: a pattern is no regular expression.
    """

    def __init__(self, include: Parameters | None, exclude: Parameters | None) -> None:
        self._include = _Rule("include", include)
        self._exclude = _Rule("exclude", exclude)
        self._is_checked = False

    def left_out_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of ``model`` that aren't averaged, by plain name.

        Raises:
            ValueError: nothing would be averaged, or one of several tied names alone; a pattern is
                found in none of the names of the first model.
        """
        if self._include.given is None and self._exclude.given is None:
            return {}
        slots = slots_of(model, leave=(Kind.CACHE,))
        tensors = {
            without_wrappers(name): slot.tensor
            for name, slot in slots.items()
            if slot.kind is Kind.PARAMETER
        }
        if not tensors:
            return {}
        if not self._is_checked:  # a model that has changed since may have lost what one names
            buffers = [without_wrappers(n) for n, s in slots.items() if s.kind is Kind.BUFFER]
            for rule in (self._include, self._exclude):
                rule.refuse_unfound(tensors, buffers)
            self._is_checked = True
        left_out = {name: tensor for name, tensor in tensors.items() if self._leaves(name, tensor)}
        if len(left_out) == len(tensors):
            raise ValueError(
                f"{self._in_words()} leaves out every parameter, and nothing would be averaged; "
                f"the names are: {naming._list(list(tensors))}"
            )
        self._refuse_parted(tensors, left_out)
        return left_out

    def _leaves(self, name: str, tensor: Tensor) -> bool:
        return not self._include.names(name, tensor, otherwise=True) or self._exclude.names(
            name, tensor, otherwise=False
        )

    def _refuse_parted(self, tensors: dict[str, Tensor], left_out: Collection[str]) -> None:
        first: dict[int, str] = {}
        for name, tensor in tensors.items():
            other = first.setdefault(id(tensor), name)
            if (name in left_out) != (other in left_out):
                out, kept = (name, other) if name in left_out else (other, name)
                raise ValueError(
                    f"{out!r} and {kept!r} are one tensor (tied), and {self._in_words()} leaves "
                    f"out the first and not the second; name both or neither"
                )

    def _in_words(self) -> str:
        return " with ".join(
            f"{rule.what}={rule.given!r}"
            for rule in (self._include, self._exclude)
            if rule.given is not None
        )


class _Rule:
    """``include`` or ``exclude``, checked."""

    def __init__(self, what: str, given: object) -> None:
        self.what = what
        self.given = given
        self._asks = given if callable(given) else None
        if given is None or self._asks is not None:
            patterns: Sequence[object] = ()
        elif isinstance(given, (str, re.Pattern)):
            patterns = (given,)
        elif isinstance(given, Sequence) and given:
            patterns = given
        else:
            raise TypeError(
                f"{what} is {given!r}; a regular expression, a list of them or a function of name "
                f"and tensor is expected"
            )
        self._expressions = [compiled(what, pattern) for pattern in patterns]

    def names(self, name: str, tensor: Tensor, *, otherwise: bool) -> bool:
        """Whether it names this parameter; ``otherwise`` if nothing says so."""
        if self._asks is not None:
            # A lazy layer's has no shape to ask about yet; it is asked again when it has one.
            return otherwise if is_lazy(tensor) else bool(self._asks(name, tensor))
        if not self._expressions:
            return otherwise
        return any(each.search(name) for each in self._expressions)

    def refuse_unfound(self, names: Iterable[str], buffers: Sequence[str]) -> None:
        names = list(names)
        for each in self._expressions:
            if any(each.search(name) for name in names):
                continue
            among = [name for name in buffers if each.search(name)]
            if among:
                raise ValueError(
                    f"{self.what}: {each.pattern!r} is found in the name of no parameter, but of "
                    f"buffers: {naming._list(among)}. Buffers are chosen by update_buffers, and "
                    f"copied unless it names them"
                )
            raise ValueError(
                f"{self.what}: {each.pattern!r} is found in the name of no parameter; names like "
                f"it are: {naming._list(_like(each.pattern, names))}"
            )


def _like(pattern: str, names: list[str]) -> list[str]:
    """``names``, those most like ``pattern`` first."""
    wanted = re.sub(r"\\[a-zA-Z]|[^\w.]", "", pattern).strip(".").lower()

    def likeness(name: str) -> float:
        matcher = difflib.SequenceMatcher(None, wanted, name.lower())
        return matcher.find_longest_match().size + matcher.ratio()

    return sorted(names, key=likeness, reverse=True)


def copied_without(model: nn.Module, *, copied: Copy, selection: Selection) -> Copied:
    """A new average of ``model`` by ``copied``, in which what isn't selected is left out.

    Raises:
        ValueError: as :meth:`Selection.left_out_of`; and what ``copied`` raises.
    """
    left_out = selection.left_out_of(model)
    module, shared = copied(model, left_out=left_out)
    if not left_out:
        return Copied(module, shared, {})
    # A wrapper around the model is not around its average.
    plain = {name: without_wrappers(name) for name in slots_of(module, (Kind.BUFFER, Kind.CACHE))}
    names = {name: left_out[own] for name, own in plain.items() if own in left_out}
    return Copied(module, shared, names)


def told(names: Sequence[str], averaged: nn.Module, update_buffers: Buffers) -> str:
    """What ``repr`` tells: parameters that are left out; and buffers, where some are chosen.

    Args:
        names: of these parameters.
        averaged: the module of the averages.
        update_buffers: which of its buffers are averaged.
    """
    copied: list[str] = []
    if not isinstance(update_buffers, bool):
        copied = [
            name
            for name, slot in slots_of(averaged, (Kind.PARAMETER, Kind.CACHE)).items()
            if not is_lazy(slot.tensor)
            and has_average(slot.tensor)
            and not is_averaged(name, slot, update_buffers)
        ]
    parts = [("left_out", names), ("copied_buffers", copied)]
    return "; ".join(
        f"{what}={len(found)}: {naming._list([without_wrappers(name) for name in found])}"
        for what, found in parts
        if found
    )
