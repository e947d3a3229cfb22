"""Averages in the model's memory: do they still hold at an update?"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor

from ema_fused.engine.dtensors import local
from ema_fused.engine.memory import is_wrapper
from ema_fused.engine.notices import warn
from ema_fused.modules.copying import FrozenShares, is_view_of
from ema_fused.modules.module_pairs import Pair
from ema_fused.modules.shared_parameter import writes_through

_trains = attrgetter("requires_grad")


class SharedPairs:
    """Pairs whose two sides are in one memory, as they were when they were paired.

    Asked at each update, so it goes over lists of tensors as fast as Python can: some 0.3
    microseconds a pair.

    Args:
        pairs: those of ``Pairs.shared``.
        shares: tells which of them are left out of the average; of these only the memory counts.
    """

    def __init__(self, pairs: Sequence[Pair], shares: FrozenShares) -> None:
        sides = [local(side) for pair in pairs for side in (pair.averaged, pair.source)]
        # Whether a DTensor's shard is another tensor is for the watch of the modules to tell.
        self._tensors = [side for side in sides if not is_wrapper(side)]
        self._places = self._addresses()
        self._frozen = [pair for pair in pairs if not shares.leave_out(pair.name)]
        self._never_train = [pair.source for pair in self._frozen]
        self._note_writes()
        self.sources = {id(pair.source) for pair in pairs}  # their identities

    def _addresses(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._tensors)]

    def _note_writes(self) -> None:
        self._writes = [writes_through(pair.averaged) for pair in self._frozen]

    def _written(self) -> list[Pair]:
        each = zip(self._frozen, self._writes, strict=True)
        return [pair for pair, count in each if writes_through(pair.averaged, count) != count]

    def hold(self) -> bool:
        """Whether all are in the memory of before; and, but for those left out, still frozen and
        unwritten.
        """
        moved = any(map(_trains, self._never_train)) or self._addresses() != self._places
        if moved or (self._frozen and self._written()):
            self._tell_of_writes()
            return False
        return True

    def _tell_of_writes(self) -> None:
        """Warns of writes through the average that have reached the model; its methods copy."""
        written = [
            pair.name
            for pair in self._written()
            if is_view_of(local(pair.averaged), local(pair.source))
        ]
        self._note_writes()
        if written:
            warn(
                f"{', '.join(written[:6])}: frozen parameters of the average were written by a "
                f"function of torch or through a view, and share_frozen keeps them in the model's "
                f"memory, so the model holds the new values too. Write by methods (weight.add_(), "
                f"weight.data += ...), which copy first, or into averaged.module of an average "
                f"without share_frozen"
            )
