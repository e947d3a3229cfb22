"""A prepared update of fixed pairs (averaged tensor, source tensor)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ema_fused.engine import backends
from ema_fused.engine.arguments import Weight, as_flag, as_step, as_weights, check_distance
from ema_fused.engine.checks import as_integer
from ema_fused.engine.distance import add_up
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.native import NativePart
from ema_fused.engine.pairs import (
    as_several,
    check_items,
    check_lists,
    label,
    labels_of,
    refuse_average,
    refuse_swap,
)
from ema_fused.engine.parts import Part, Update, kind_of, tasks_of
from ema_fused.engine.planned_parts import PlannedParts, changed_meanwhile
from ema_fused.engine.rounding import check_rounding, check_seed
from ema_fused.engine.streams import SideStreams, check_stream
from ema_fused.engine.versions import VersionCounters

ARITHMETICS = ("lerp", "axpby", "delta", "products")


class Plan:
    """Pairs of tensors, prepared once and updated in one launch per device.

    Before each launch every data pointer is compared with the planned one (some 10 nanoseconds per
    tensor, several times that if its header isn't in the caches). So a tensor whose storage was
    replaced (``param.data = other``) is updated in its new storage. Autograd records nothing.

    Args:
        averaged: tensors to update in place, of any shapes and devices, in float64, float32,
            bfloat16, float16, complex64 or complex128 (other dtypes can be copied). Or up to eight
            such lists: several averages of one source. The source is read only once for all
            averages of a pair that have the same dtype and the same offset from a 16-byte boundary;
            tensors of one dtype have the same offset unless they are views.
        source: as many tensors, each of the shape of its averaged tensor; device and dtype may
            differ (the dtype not of complex tensors). float8_e4m3fn and float8_e5m2 are allowed
            too, and converted to their values.
        arithmetic: how an average is written, with w the weight of the source.
            ``"lerp"``: as ``torch.lerp``. ``"axpby"``: as ``averaged.mul_(1 - w).add_(source,
            alpha=w)``. ``"delta"``: as ``averaged.add_(source - averaged, alpha=w)``.
            ``"products"``: as ``averaged * (1 - w) + source * w``.
            Equal in exact arithmetic; they differ in the last bits.
        only_copy: one flag per pair: True for pairs that :meth:`lerp_` copies instead of averaging
            (integer buffers, buffers that are copies of the model's). They may be sparse, both of
            one layout. None: all are averaged.
        backend: ``"cuda"``, ``"cpu"`` or ``"foreach"`` uses that backend for all pairs; None takes
            the fastest for each pair.
        names: one per pair, for messages.
        rounding: of 16-bit averages. ``"nearest"``: as torch does; changes below half a unit in the
            last place are lost. ``"stochastic"``: up or down at random, so that the expected value
            is exact and small changes are not lost in the long run. Needs arithmetic ``"lerp"``.
        seed: of the random bits, in [0, 2**63). The bits depend on the seed, the step, the pair and
            the element alone: not on the device or the backend.
        numbers: one per pair: the number that its random bits are counted by. None: its index in
            the lists.
        version_counters: count up the version counters of the tensors that are written, as torch's
            own operations do, so that autograd refuses a backward pass through values that were
            overwritten after the forward pass. It takes some 40 nanoseconds per tensor; leave it
            out for tensors that are in no graph. (A replayed CUDA graph never counts.)

    Threads may share a plan: each launch on a native backend waits for that of another thread to be
    done (on CUDA: to be on its stream). Not its own :attr:`step` and ``stream=``: those are for one
    thread at a time.

    A pair that occurs twice (tied tensors) is updated once; a pair whose two sides are the same
    memory is left alone; empty tensors are allowed. The plan allocates only its chunk table (48
    bytes per chunk).

    Attributes:
        averaged: the averaged tensors; with several averages, their lists concatenated.
        source: the source of each.
        averages: how many averages each source has.
        compiled: the extension's Plan if it alone makes a plain average of all pairs; else None.
        step: how many times :meth:`lerp_` was called without ``step``, including calls that
            ``found_inf`` made do nothing. The random bits are counted by it.

    Raises:
        TypeError: an item is not a tensor, or a kind without plain strided elements (sparse, unless
            it is only copied, quantized, nested, DTensor, FakeTensor).
        ValueError: lists of different length, shapes that differ within a pair, tensors without
            data (meta), averaged tensors that overlap themselves or other tensors, an unknown
            arithmetic, rounding or backend, more than eight averages.
        RuntimeError: the backend asked for can't serve these tensors here.
    """

    def __init__(
        self,
        averaged: Sequence[Tensor] | Sequence[Sequence[Tensor]],
        source: Sequence[Tensor],
        *,
        arithmetic: str = "lerp",
        only_copy: Sequence[bool] | None = None,
        backend: str | None = None,
        names: Sequence[str] | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        version_counters: bool = False,
    ) -> None:
        several = as_several(averaged)
        for one in several:
            check_lists(one, source)
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r} is none of {', '.join(ARITHMETICS)}")
        check_rounding(rounding)
        seed = check_seed(seed)
        if rounding == "stochastic" and arithmetic != "lerp":
            raise ValueError(
                f"rounding 'stochastic' goes with arithmetic 'lerp', and {arithmetic!r} was given: "
                f"its own roundings are what stochastic rounding replaces"
            )
        for what, items in (("only_copy", only_copy), ("names", names), ("numbers", numbers)):
            check_items(what, items, len(source))
        if backend is not None:
            backends.check_name(backend)
        self.averaged = [tensor for one in several for tensor in one]
        self.source = list(source) * len(several)
        self.averages = len(several)
        self.arithmetic = arithmetic
        self.backend = backend
        self.rounding = rounding
        self.seed = seed
        self.step = 0
        self._only_copy = [False] * len(source) if only_copy is None else list(only_copy)
        self._names = None if names is None else list(names)
        self._numbers = None if numbers is None else list(numbers)
        self._side_streams = SideStreams()
        self._counts = version_counters
        self._averaged_versions = VersionCounters(self.averaged if version_counters else ())
        self._source_versions = VersionCounters(source if version_counters else ())
        self._build()

    def _build(self) -> None:
        tasks = tasks_of(self.averaged, self.source, self._only_copy, self._numbers, self.averages)
        arithmetic = "stochastic" if self.rounding == "stochastic" else self.arithmetic
        self._labels = labels_of(self._names, len(self._only_copy), self.averages)
        self._parts = PlannedParts(tasks, arithmetic, self.backend, self._labels)
        # The fast path: with one native part, lerp_ calls its launch directly.
        parts = self._parts.parts
        self.compiled: Any = None
        self._average_at_once: Any = None
        is_plain = self.rounding == "nearest" and self._parts.no_average is None
        if is_plain and len(parts) == 1 and isinstance(sole := parts[0], NativePart):
            self.compiled = sole.compiled
            self._average_at_once = self.compiled.run
            self._AVERAGE = sole.AVERAGE

    def _rebuild(self) -> None:
        """Plans again, provided that dtypes and shapes are still those planned.

        Raises:
            ValueError: a dtype or shape has changed; nothing was updated.
        """
        changed = self._parts.changed()
        if changed is not None:
            which = "source" if changed.is_source else "averaged tensor"
            tensor = (self.source if changed.is_source else self.averaged)[changed.pair]
            raise ValueError(
                f"{label(changed.pair, self._labels)}: the {which} was planned as "
                f"{changed.planned} and is now {kind_of(tensor)}; make a new Plan for it"
            )
        self._build()

    def is_as_planned(self) -> bool:
        """Whether every tensor's dtype, shape, strides and device are those planned; moved memory
        makes no difference.

        Raises:
            ValueError: tensors that have moved overlap now.
        """
        return self._parts.ready()

    def _run(self, operation: Callable[[PlannedParts], bool]) -> None:
        """Runs all parts; if a tensor is no longer as planned, plans again before any part runs."""
        if not operation(self._parts):
            self._rebuild()
            if not operation(self._parts):
                raise changed_meanwhile()

    @outside_graphs
    def lerp_(
        self,
        weight: Weight | Sequence[Weight],
        *,
        found_inf: Tensor | None = None,
        step: int | Tensor | None = None,
        stream: torch.cuda.Stream | None = None,
        squared_distance: Tensor | None = None,
    ) -> None:
        """Averages: ``averaged = (1 - weight) * averaged + weight * source``, in place.

        Doesn't synchronise with the CUDA device of the averages: the kernel reads numbers that are
        on the device. So the update can be captured into a CUDA graph.

        Args:
            weight: of the source; a number or a 0-dim tensor. With one average also a sequence of
                one number per pair; with several averages a sequence of one number or 0-dim tensor
                per average. Not limited to [0, 1]. A captured CUDA graph reads a tensor on its
                device again at every replay; any other number stays as it was at the capture.
            found_inf: a tensor of one number, as ``torch.amp.GradScaler`` keeps it: unless it is 0,
                this update does nothing.
            step: the counter of stochastic rounding's random bits, modulo 2**32: an integer or a
                0-dim int64 tensor. None: the plan's own :attr:`step`, which is then incremented.
            stream: the ``torch.cuda.Stream`` to run on, instead of the current one. It first waits
                for the work already in the current stream. Before other code writes the source or
                reads the averages, call :meth:`wait` on that code's stream; this plan's own methods
                do so themselves. The stream must live as long as the plan.
            squared_distance: a float64 tensor on any device to write into: 0-dim, with several
                averages of shape (averages,). It gets the sum of ``|source - averaged|**2`` over
                all averaged elements, with the values from before this update, measured in the same
                pass over the data. It is written in stream order; the host waits only if it is on
                another device than the averages. If ``found_inf`` makes the update do nothing, it
                is left unchanged. Pairs that are only copied don't count, tied ones count once.
                Differences are taken in float32 (in float64 if either tensor is float64), squared
                and summed up in float64: the relative error is below 1e-6. Results are bitwise
                reproducible on one device, on a CPU with any number of threads. The averages are
                bitwise the same with and without it.

        Raises:
            TypeError: a pair that has no average (integers, bool) and isn't ``only_copy``; a
                squared_distance that is no float64 tensor.
            ValueError: a tensor's dtype or shape has changed, the weights are not as many as they
                should be, or squared_distance has another shape.
            RuntimeError: the update is captured into a CUDA graph and would draw the same random
                bits at every replay.

        If an error is raised, nothing has been updated.
        """
        at_once = self._average_at_once
        if (
            type(weight) is float
            and at_once is not None
            and found_inf is None
            and step is None
            and stream is None
            and squared_distance is None
            and not self._side_streams.unfinished
        ):
            try:
                if at_once(self._AVERAGE, weight):
                    self.step += 1
                    if self._counts:
                        self._averaged_versions.increment()
                    return
            except ValueError:
                pass  # raised again below, with the names of the pairs
        self._average(weight, found_inf, step, stream, squared_distance)

    def _average(
        self,
        weight: Weight | Sequence[Weight],
        found_inf: Tensor | None,
        step: int | Tensor | None,
        stream: torch.cuda.Stream | None,
        squared_distance: Tensor | None,
    ) -> None:
        i = self._parts.no_average
        if i is not None:
            raise refuse_average(self.averaged[i], self.source[i], label(i, self._labels))
        weights, by_pair = as_weights(weight, self.averages, len(self.averaged), self._labels)
        update = Update(
            weights,
            by_pair,
            None if found_inf is None else as_flag(found_inf),
            self.seed,
            as_step(self.step if step is None else step),
            None if squared_distance is None else [],
        )
        if squared_distance is not None:
            check_distance(squared_distance, self.averages)
        used = (*weights, update.found_inf, update.step, squared_distance)
        with self._on(stream, [item for item in used if isinstance(item, Tensor)]):
            self._run(lambda parts: parts.average(update))
            if squared_distance is not None and update.distances is not None:
                add_up(update.distances, squared_distance, update.found_inf)
        if step is None:
            self.step += 1
        if self._counts:
            self._averaged_versions.increment()

    @outside_graphs
    def copy_(self, *, stream: torch.cuda.Stream | None = None) -> None:
        """Copies every source into its averaged tensors, converting the dtype where the two differ.

        Args:
            stream: as in :meth:`lerp_`.

        Raises:
            ValueError: a tensor's dtype or shape has changed; nothing has been updated then.
        """
        with self._on(stream):
            self._run(PlannedParts.copy)
        if self._counts:
            self._averaged_versions.increment()

    @outside_graphs
    def swap_(self, *, stream: torch.cuda.Stream | None = None) -> None:
        """Exchanges the contents of averaged and source tensors, without a temporary.

        (Pairs on two devices, and pairs that ``foreach`` serves, need a temporary as large as one
        tensor.)

        Args:
            stream: as in :meth:`lerp_`.

        Raises:
            TypeError: a pair whose dtypes differ.
            ValueError: a tensor's dtype or shape has changed, sources overlap, or there are several
                averages. Nothing has been swapped then.
        """
        if self.averages > 1:
            raise ValueError(
                f"a source can't be swapped with {self.averages} averages at once; make a Plan of "
                f"the one to swap it with"
            )
        i = self._parts.no_swap
        if i is not None:
            raise refuse_swap(self.averaged[i], self.source[i], label(i, self._labels))
        with self._on(stream):
            self._run(PlannedParts.swap)
        if self._counts:
            self._averaged_versions.increment()
            self._source_versions.increment()

    def _on(
        self, stream: torch.cuda.Stream | None, scalars: Sequence[Tensor] = ()
    ) -> AbstractContextManager[None]:
        if stream is None:
            self.wait()
            return nullcontext()
        check_stream(stream, self.averaged)
        return self._side_streams.running_on(stream, [*self.averaged, *self.source, *scalars])

    @outside_graphs
    def wait(self) -> None:
        """Makes each device's current stream wait for updates that run on another ``stream``.

        The host doesn't wait. Call it before the optimizer writes the source, and before a CUDA
        graph is captured.
        """
        self._side_streams.wait()

    def is_idle(self) -> bool:
        """Whether no update on another stream is unfinished."""
        return not self._side_streams.unfinished

    def state_dict(self) -> dict[str, int]:
        """The state of stochastic rounding: ``seed`` and ``step``."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resumes stochastic rounding from a saved :meth:`state_dict`, bit for bit.

        Args:
            state: a dict that :meth:`state_dict` returned.

        Raises:
            KeyError: one of ``seed`` and ``step`` is missing.
            TypeError, ValueError: one of them is no integer, or out of range.
        """
        missing = [key for key in ("seed", "step") if key not in state]
        if missing:
            raise KeyError(f"{' and '.join(missing)} missing: not the state of a Plan")
        self.seed, self.step = check_seed(state["seed"]), as_integer(state["step"], "step")

    def give_up(self) -> list[Part]:
        """Hands the parts over to the caller; the plan must not be used afterwards."""
        return self._parts.parts

    @property
    def backends(self) -> tuple[str, ...]:
        """Which backends serve this plan."""
        return tuple(dict.fromkeys(part.backend for part in self._parts.parts))

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of the averaged tensors."""
        return tuple(dict.fromkeys(str(tensor.device) for tensor in self.averaged))

    @property
    def tensors(self) -> int:
        """How many averaged tensors there are, empty and repeated ones included."""
        return len(self.averaged)

    @property
    def elements(self) -> int:
        """How many elements an update writes."""
        return sum(part.elements for part in self._parts.parts)

    @property
    def chunks(self) -> int:
        """How many entries the chunk tables have."""
        return sum(part.chunks for part in self._parts.native)

    @property
    def launches(self) -> int:
        """How many kernels an update launches: one per device where a native kernel has work.

        (Not counted: sources on another device, which are copied over and planned at each update.)
        """
        return sum(1 for part in self._parts.native if part.chunks)

    def __repr__(self) -> str:
        return (
            f"Plan(devices={list(self.devices)}, backends={list(self.backends)}, "
            f"arithmetic={self.arithmetic!r}, rounding={self.rounding!r}, "
            f"averages={self.averages}, tensors={self.tensors}, elements={self.elements:,}, "
            f"chunks={self.chunks:,}, launches={self.launches})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The constructor's arguments; the compiled parts hold addresses and can't be pickled."""
        pairs = len(self._only_copy)
        lists = [self.averaged[k * pairs : (k + 1) * pairs] for k in range(self.averages)]
        return {
            "averaged": lists if self.averages > 1 else self.averaged,
            "source": self.source[:pairs],
            "arithmetic": self.arithmetic,
            "only_copy": self._only_copy,
            "backend": self.backend,
            "names": self._names,
            "rounding": self.rounding,
            "seed": self.seed,
            "numbers": self._numbers,
            "version_counters": self._counts,
            "step": self.step,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        averaged, source, step = state.pop("averaged"), state.pop("source"), state.pop("step")
        self.__init__(averaged, source, **state)  # type: ignore[misc]
        self.step = step
