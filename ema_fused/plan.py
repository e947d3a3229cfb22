"""The prepared update of fixed pairs (averaged tensor, source tensor)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ema_fused import backends
from ema_fused.native import NativePart
from ema_fused.pairs import check_lists, label, refuse_average, refuse_swap
from ema_fused.parts import Part, kind_of
from ema_fused.routing import split

ARITHMETICS = ("lerp", "axpby", "delta")


class Plan:
    """Pairs of tensors, prepared once and updated in one launch a device.

    Before each launch every pointer is compared with what was planned (some nanoseconds a tensor):
    tensors whose storage was replaced (``param.data = other``) are followed. Nothing is recorded by
    autograd, and tensors' version counters don't move.

    Args:
        averaged: tensors to update in place, of any shapes, dtypes and devices.
        source: as many tensors, each of the shape of its averaged tensor; dtype and device may
            differ from it.
        arithmetic: how an average is written, with w the weight of the source.
            ``"lerp"``: as ``torch.lerp``. ``"axpby"``: as ``averaged.mul_(1 - w).add_(source,
            alpha=w)``. ``"delta"``: as ``averaged.add_(source - averaged, alpha=w)``.
            Equal in exact arithmetic; they differ in the last bits.
        only_copy: one flag a pair: pairs that :meth:`lerp_` copies instead of averaging (integer
            buffers, buffers that follow the model). None: no pair.
        backend: ``"cuda"``, ``"cpu"`` or ``"foreach"`` pins one; None takes the best for each pair.
        names: one a pair, for messages.

    A pair that occurs twice (tied tensors) is updated once; a pair whose two sides are the same
    memory is left alone; empty tensors are fine. The plan owns no memory but its chunk table (32
    bytes a chunk).

    Raises:
        TypeError: an item is not a tensor, or a kind without plain strided elements (sparse,
            quantized, nested, DTensor, FakeTensor).
        ValueError: lists of different length, shapes that differ within a pair, tensors without
            data (meta), averaged tensors that overlap themselves or other tensors, an unknown
            arithmetic or backend.
        RuntimeError: the backend asked for can't serve these tensors here.
    """

    def __init__(
        self,
        averaged: Sequence[Tensor],
        source: Sequence[Tensor],
        *,
        arithmetic: str = "lerp",
        only_copy: Sequence[bool] | None = None,
        backend: str | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        check_lists(averaged, source)
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r} is none of {', '.join(ARITHMETICS)}")
        for what, flags in (("only_copy", only_copy), ("names", names)):
            if flags is not None and len(flags) != len(averaged):
                raise ValueError(f"{what} has {len(flags)} items for {len(averaged)} pairs")
        if backend is not None:
            backends.check_name(backend)
        self.averaged = list(averaged)
        self.source = list(source)
        self.arithmetic = arithmetic
        self.backend = backend
        self._only_copy = [False] * len(self.averaged) if only_copy is None else list(only_copy)
        self._names = None if names is None else list(names)
        self._build()

    def _build(self) -> None:
        self._parts: list[Part] = split(
            self.averaged,
            self.source,
            self._only_copy,
            self.arithmetic,
            self.backend,
            self._names,
        )
        parts = self._parts
        self._no_average = min(
            (p.no_average for p in parts if p.no_average is not None), default=None
        )
        self._no_swap = min((p.no_swap for p in parts if p.no_swap is not None), default=None)
        # The shortest way: one native part that can average goes from lerp_ to its launch.
        sole = self._parts[0] if len(self._parts) == 1 else None
        self._average_at_once: Any = None
        if isinstance(sole, NativePart) and self._no_average is None:
            self._average_at_once = sole.run
            self._AVERAGE = sole.AVERAGE

    def _rebuild(self) -> None:
        """Plans again for tensors that are still of the planned kind.

        Raises:
            ValueError: a dtype or shape has changed; nothing was updated.
        """
        for part in self._parts:
            changed = part.changed()
            if changed is not None:
                which = "source" if changed.is_source else "averaged tensor"
                tensor = (self.source if changed.is_source else self.averaged)[changed.pair]
                raise ValueError(
                    f"{label(changed.pair, self._names)}: the {which} was planned as "
                    f"{changed.planned} and is now {kind_of(tensor)}; make a new Plan for it"
                )
        self._build()

    def _run(self, operation: Callable[[Part], bool]) -> None:
        """Runs all parts; where a tensor is no longer as planned, none before planning again."""
        if len(self._parts) == 1:
            if operation(self._parts[0]):
                return
            self._rebuild()
        elif not all(part.ready() for part in self._parts):
            self._rebuild()
        for part in self._parts:
            if not operation(part):
                raise RuntimeError("a tensor was changed while it was being updated")

    def lerp_(self, weight: float | Sequence[float] | Tensor) -> None:
        """Averages: ``averaged = (1 - weight) * averaged + weight * source``, in place.

        Args:
            weight: of the source; a number, a 0-dim tensor, or a sequence of one number a pair. Not
                limited to [0, 1].

        Raises:
            TypeError: a pair that has no average (integers, bool) and isn't ``only_copy``.
            ValueError: a tensor's dtype or shape has changed, or the weights are not one a pair.
            Nothing has been updated then.
        """
        at_once = self._average_at_once
        if type(weight) is float and at_once is not None:
            try:
                if at_once(self._AVERAGE, weight):
                    return
            except ValueError:
                pass  # raised again below, with the names of the pairs
        self._average(weight)

    def _average(self, weight: float | Sequence[float] | Tensor) -> None:
        if self._no_average is not None:
            i = self._no_average
            raise refuse_average(self.averaged[i], self.source[i], label(i, self._names))
        number, weights = self._as_weights(weight)
        self._run(lambda part: part.average(number, [weights[i] for i in part.indices if weights]))

    def _as_weights(self, weight: float | Sequence[float] | Tensor) -> tuple[float, list[float]]:
        """(the number for all pairs, or one number a pair)."""
        if isinstance(weight, Tensor):
            if weight.dim() > 0:
                raise ValueError(
                    f"the weight is a tensor of shape {tuple(weight.shape)}; a number, a 0-dim "
                    f"tensor or a list of one number a pair is expected"
                )
            return float(weight), []
        if isinstance(weight, Sequence) and not isinstance(weight, str):
            if len(weight) != len(self.averaged):
                raise ValueError(
                    f"{len(weight)} weights for {len(self.averaged)} pairs; one a pair is expected"
                )
            return 0.0, [float(w) for w in weight]
        if isinstance(weight, (str, complex)):
            raise TypeError(f"the weight is {weight!r}; a real number is expected")
        return float(weight), []

    def copy_(self) -> None:
        """Copies every source into its averaged tensor, converting the dtype where they differ.

        Raises:
            ValueError: a tensor's dtype or shape has changed; nothing has been updated then.
        """
        self._run(lambda part: part.copy())

    def swap_(self) -> None:
        """Exchanges the contents of averaged and source tensors, without a temporary.

        (Pairs on two devices, and those left to ``foreach``, take a temporary of one tensor.)

        Raises:
            TypeError: a pair of two dtypes.
            ValueError: a tensor's dtype or shape has changed, or sources overlap. Nothing has been
            swapped then.
        """
        if self._no_swap is not None:
            i = self._no_swap
            raise refuse_swap(self.averaged[i], self.source[i], label(i, self._names))
        self._run(lambda part: part.swap())

    @property
    def backends(self) -> tuple[str, ...]:
        """Which backends serve this plan."""
        return tuple(dict.fromkeys(part.backend for part in self._parts))

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the averaged tensors are."""
        return tuple(dict.fromkeys(str(tensor.device) for tensor in self.averaged))

    @property
    def tensors(self) -> int:
        """Pairs, empty and repeated ones included."""
        return len(self.averaged)

    @property
    def elements(self) -> int:
        """Elements that an update writes."""
        return sum(part.elements for part in self._parts)

    @property
    def chunks(self) -> int:
        """Entries of the chunk tables."""
        return sum(part.chunks for part in self._parts if isinstance(part, NativePart))

    @property
    def launches(self) -> int:
        """Kernel launches of an update: one a native part that has anything to do."""
        return sum(1 for part in self._parts if isinstance(part, NativePart) and part.chunks)

    def __repr__(self) -> str:
        return (
            f"Plan(devices={list(self.devices)}, backends={list(self.backends)}, "
            f"arithmetic={self.arithmetic!r}, tensors={self.tensors}, elements={self.elements:,}, "
            f"chunks={self.chunks:,}, launches={self.launches})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a plan is made of. The compiled part holds addresses: never copied or saved."""
        return {
            "averaged": self.averaged,
            "source": self.source,
            "arithmetic": self.arithmetic,
            "only_copy": self._only_copy,
            "backend": self.backend,
            "names": self._names,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        averaged, source = state.pop("averaged"), state.pop("source")
        self.__init__(averaged, source, **state)  # type: ignore[misc]
