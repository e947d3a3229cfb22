"""A momentum for each part of a model: patterns of names, each with its own."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from ema_fused.averages.momentum import check_function, checked_number, combined
from ema_fused.engine.checks import check_fraction, check_momentum
from ema_fused.modules import naming
from ema_fused.modules.choosing import Buffers, Pattern, compiled
from ema_fused.modules.module_pairs import has_average, is_averaged, slots_of
from ema_fused.modules.naming import without_wrappers

Momentum = float | Callable[[int], float]


class NamedWeights:
    """The weights of one average: called with a tensor's name, it returns that tensor's.

    Attributes:
        least: the smallest that isn't 0.
    """

    def __init__(self, momenta: MomentumByName, numbers: tuple[float, ...]) -> None:
        self._momenta = momenta
        self.numbers = numbers
        self.least = min((number for number in numbers if number), default=0.0)

    def __call__(self, name: str) -> float:
        return self.numbers[self._momenta.place_of(name)]


class MomentumByName:
    """The momenta of a mapping from regular expressions to numbers or functions of the step.

    A tensor has that of the first pattern that is found in its name, of the plain model.

    Attributes:
        given: the mapping; its values may be changed while training.

    Raises:
        TypeError: a key is no pattern, or a value neither a number nor callable.
        ValueError: a key is no regular expression, or a number is outside [0, 1].
    """

    def __init__(self, given: dict[Pattern, Momentum]) -> None:
        self.given = given
        self._patterns = list(given)
        self._expressions = [compiled("momentum", pattern) for pattern in given]
        for pattern, value in given.items():
            if callable(value):
                check_function(f"momentum of {pattern!r}", value)
            else:
                check_fraction(f"momentum of {pattern!r}", value)
                if 0 < value < 1:
                    check_momentum(value)  # warns above 0.5
        self._places: dict[str, int] = {}
        self._last: NamedWeights | None = None

    def is_of(self, given: dict[Pattern, Momentum]) -> bool:
        """Whether it was made of this mapping, with these patterns."""
        return given is self.given and list(given) == self._patterns

    def place_of(self, name: str) -> int:
        """The index of the pattern that counts for ``name``.

        Raises:
            ValueError: none is found in it.
        """
        place = self._places.get(name)
        if place is None:
            plain = without_wrappers(name)
            found = (i for i, each in enumerate(self._expressions) if each.search(plain))
            place = next(found, -1)
            if place < 0:
                raise ValueError(
                    f"momentum has no pattern for {plain!r}; add one, or at its end one that is "
                    f"found in every name: {{..., '': 0.001}}"
                )
            self._places[name] = place
        return place

    def _is_named(self, name: str) -> bool:
        return any(each.search(without_wrappers(name)) for each in self._expressions)

    def check(
        self,
        averaged: nn.Module,
        update_buffers: Buffers,
        shared: Collection[str],
        left_out: Collection[str] = (),
    ) -> None:
        """Raises ValueError unless each averaged tensor has a momentum, and each pattern a tensor.

        Nothing is asked of a module without any.

        Args:
            averaged: the module with the averages.
            shared: names that aren't averaged at present, and need no momentum.
            left_out: names that are never averaged, and have none.
        """
        tied: dict[int, tuple[str, int]] = {}
        names, used = [], set()
        for name, slot in slots_of(averaged).items():
            if not is_averaged(name, slot, update_buffers) or not has_average(slot.tensor):
                continue
            if name in left_out or (name in shared and not self._is_named(name)):
                continue
            place = self.place_of(name)
            names.append(without_wrappers(name))
            used.add(place)
            first, other = tied.setdefault(id(slot.tensor), (name, place))
            one, two = (self.given[self._patterns[i]] for i in (other, place))
            if one is not two and one != two:
                raise ValueError(
                    f"{first!r} and {name!r} are one tensor (tied), and momentum has {one!r} for "
                    f"the first and {two!r} for the second; give both the same"
                )
        for place, pattern in enumerate(self._patterns):
            if names and place not in used:
                raise ValueError(
                    f"momentum: {pattern!r} counts for no averaged tensor: it is found in none of "
                    f"their names, or an earlier pattern is found in the same; the names are: "
                    f"{naming._list(names)}"
                )

    def at(self, averaged: object, steps: int, calls: int) -> NamedWeights:
        """The weights of the average that stands for the last ``calls`` calls; the same object as
        long as the numbers stay.

        Args:
            averaged: whose momentum it is, for messages.
            steps: the step of the last of them.

        Raises:
            TypeError: a function returned no number.
            ValueError: a momentum is outside [0, 1].
        """
        numbers = tuple(
            combined(
                checked_number(
                    averaged,
                    value(step) if callable(value) else value,
                    f"for {pattern!r}, step {step}",
                )
                for step in range(steps - calls + 1, steps + 1)
            )
            for pattern, value in self.given.items()
        )
        if self._last is None or self._last.numbers != numbers:
            self._last = NamedWeights(self, numbers)
        return self._last
