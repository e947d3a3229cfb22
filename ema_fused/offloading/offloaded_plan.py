"""Averages in host memory, updated by a thread while the training goes on."""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ema_fused.engine.arguments import as_flag, as_weights, check_distance
from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.checks import as_integer, check_integer
from ema_fused.engine.host_memory import host_memory
from ema_fused.engine.pairs import can_average, label, refuse_average
from ema_fused.engine.parts import kind_of
from ema_fused.engine.plan import Plan
from ema_fused.engine.rounding import check_seed
from ema_fused.offloading.background import OffloadedUpdate, Worker
from ema_fused.offloading.staging import LEAST_BYTES, PairOptions, Piece, Staging

__all__ = ["OffloadedPlan", "host_memory"]

# Of a tensor, to see that it is as planned. Asked by map(): some 0.3 microseconds a tensor.
_FACTS: tuple[Callable[[Tensor], Any], ...] = (
    operator.attrgetter("dtype"),
    operator.attrgetter("shape"),
    Tensor.stride,
    Tensor.data_ptr,
)


class OffloadedPlan:
    """A :class:`~ema_fused.Plan` whose averages are on the CPU, carried out in the background.

    :meth:`lerp_` and :meth:`copy_` return at once. A thread brings the sources over, piece by piece
    through two staging buffers, and averages them there; the results have the bits that
    ``Plan(averaged, [s.cpu() for s in source])`` gives. Before the sources are written again
    (``optimizer.step()``), call :meth:`wait_until_read`; before the averages are read,
    :meth:`flush`::

        loss.backward()
        plan.wait_until_read()
        optimizer.step()
        plan.lerp_(0.001)

    One update is under way at a time: the next waits for it, none is dropped. Where the training
    has to wait, a plan says so once, by a :class:`~ema_fused.SlowPathWarning`.

    A device's memory holds the two buffers beside the chunk tables (48 bytes a chunk). The sources'
    memory, replaced tensors' too, is kept until an update that reads it is done. A plan is used by
    one thread at a time. While a CUDA graph is captured there should be no update under way.

    An update that is unfinished when the plan is deleted, or when the interpreter exits, is
    finished (at exit within a minute). After ``os.fork`` the child's plan starts a thread of its
    own, with CPU sources; an update that was under way at the fork stays unfinished there, so
    :meth:`flush` before.

    Args:
        averaged: tensors on the CPU, as a Plan takes them; best from :func:`host_memory`.
        source: as many tensors, on CUDA devices or on the CPU.
        arithmetic, only_copy, backend, names, rounding, numbers: as a Plan takes them; ``backend``
            is that of the averages.
        staging_bytes: of each buffer, at least 1024. Tensors are cut to fit, but those whose bits
            depend on where an element stands, which make the buffers as large as the largest of
            them: 16-bit averages with stochastic rounding, tensors that ``foreach`` serves, and
            pairs of two layouts or with gaps.

    Attributes:
        averaged: the averaged tensors.
        source: the source of each.
        staged_bytes: of one buffer, as it is now.

    Raises:
        TypeError, ValueError, RuntimeError: as a Plan does; an averaged tensor that isn't on the
            CPU, or a source on a device other than those.

    Every method raises RuntimeError where the thread failed: at the first call after it, once, from
    the thread's exception. Whatever that call was to do is not done then, but waiting and closing.
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
        rounding: str = "nearest",
        numbers: Sequence[int] | None = None,
        staging_bytes: int = 64 * 2**20,
    ) -> None:
        check_integer("staging_bytes", staging_bytes, least=LEAST_BYTES)
        self._arguments: dict[str, Any] = {
            "arithmetic": arithmetic,
            "only_copy": only_copy,
            "backend": backend,
            "names": names,
            "rounding": rounding,
            "numbers": numbers,
        }
        # Refuses what a Plan refuses, before the lists are taken for granted.
        if Plan(averaged, source, **self._arguments).averages > 1:
            raise TypeError(
                "averaged is a list of lists; an OffloadedPlan keeps one average: make one for each"
            )
        self.averaged = list(averaged)
        self.source = list(source)
        pairs = len(self.source)
        self._options = PairOptions(
            arithmetic,
            rounding,
            backend,
            [False] * pairs if only_copy is None else list(only_copy),
            list(range(pairs)) if numbers is None else list(numbers),
            None if names is None else list(names),
        )
        self._staging = Staging(operator.index(staging_bytes))
        self._worker: Worker | None = None
        self._ending: weakref.finalize[Any, Any] | None = None
        self._update: OffloadedUpdate | None = None
        self._has_warned = False
        self._plan_pieces()

    # ---- Planning --------------------------------------------------------------------------------

    @torch.inference_mode(False)  # a tensor made in it could not be written by the thread
    def _plan_pieces(self) -> None:
        # The buffers of the last go before there are others.
        self._pieces: list[Piece] = []
        self._last_pieces: list[Piece] = []  # of each stream
        self._facts: list[list[Any]] = []
        for i, (averaged, source) in enumerate(zip(self.averaged, self.source, strict=True)):
            for which, tensor, devices in (
                ("averaged tensor", averaged, ("cpu",)),
                ("source", source, ("cpu", "cuda")),
            ):
                if tensor.device.type not in devices:
                    raise ValueError(
                        f"{label(i, self._options.names)}: the {which} is on {tensor.device}; an "
                        f"OffloadedPlan takes it on {' or '.join(devices)}; use a Plan for others"
                    )
        only_copy = self._options.only_copy
        self._no_average = next(
            (
                i
                for i, (a, s) in enumerate(zip(self.averaged, self.source, strict=True))
                if not only_copy[i] and not can_average(a, s)
            ),
            None,
        )
        self._pieces = self._staging.pieces(self.averaged, self.source, self._options)
        self._streams = list({p.stream: None for p in self._pieces if p.stream is not None})
        self._last_pieces = [
            [piece for piece in self._pieces if piece.stream is stream][-1]
            for stream in self._streams
        ]
        # Pinned now: no update waits for it.
        self._flag = host_memory(torch.empty(1, device="meta")) if self._streams else None
        self._facts = self._current_facts()

    def _current_facts(self) -> list[list[Any]]:
        """What was planned for, fact by fact: of the averaged tensors, then of the sources."""
        tensors = self.averaged + self.source
        return [list(map(fact, tensors)) for fact in _FACTS]

    def _follow(self) -> None:
        """Plans again where tensors have got other memory.

        Raises:
            ValueError: a dtype or shape has changed; nothing was updated.
        """
        facts = self._current_facts()
        if facts == self._facts:
            return
        # Nothing to compare with where planning has failed before.
        kinds, planned = (list(zip(*known[:2], strict=True)) for known in (facts, self._facts))
        for k, ((dtype, shape), now) in enumerate(zip(planned, kinds, strict=False)):
            if now != (dtype, shape):
                is_source, i = divmod(k, len(self.source))
                was = f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"
                raise ValueError(
                    f"{label(i, self._options.names)}: the "
                    f"{'source' if is_source else 'averaged tensor'} was planned as {was} and is "
                    f"now {kind_of((self.averaged + self.source)[k])}; make a new OffloadedPlan "
                    f"for it"
                )
        Plan(self.averaged, self.source, **self._arguments)
        self._plan_pieces()

    @property
    def staged_bytes(self) -> int:
        """Of one buffer, as it is now; 0 where nothing is to be updated."""
        return max((piece.buffer_bytes for piece in self._pieces), default=0)

    # ---- Updates ---------------------------------------------------------------------------------

    def lerp_(
        self,
        weight: float,
        *,
        found_inf: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        squared_distance: Tensor | None = None,
    ) -> None:
        """Starts ``averaged = (1 - weight) * averaged + weight * source``; waits for no device.

        Args:
            weight: of the source, a number.
            found_inf: a tensor of one number: anything but 0 makes this update do nothing. On a
                CUDA device it is read in the order of its current stream, not waited for.
            seed: of stochastic rounding's random bits, in [0, 2**63).
            step: what they are counted by, modulo 2**32.
            squared_distance: a 0-dim float64 tensor on the CPU, as :meth:`Plan.lerp_` takes it. The
                thread writes it once, when the update is done.

        Raises:
            TypeError: a pair that has no average (integers, bool) and isn't ``only_copy``; the
                weight, seed or step is no number.
            ValueError: a tensor's dtype or shape has changed.
            RuntimeError: a CUDA graph is being captured, or as said of the class.
            Nothing has been updated then.
        """
        if isinstance(weight, Sequence) and not isinstance(weight, str):
            raise TypeError("the weight is a list; an OffloadedPlan takes one number for all pairs")
        number = float(as_weights(weight, 1, 0, None)[0][0])
        check_seed(seed)
        step = as_integer(step, "step")
        flag = None if found_inf is None else as_flag(found_inf)
        if squared_distance is not None:
            check_distance(squared_distance, 1)
        self._get_ready()
        if self._no_average is not None:
            i = self._no_average
            name = label(i, self._options.names)
            raise refuse_average(self.averaged[i], self.source[i], name)
        if flag is not None and not flag.is_cuda:
            if bool(flag):
                return
            flag = None
        run = functools.partial(Piece.average, weight=number, seed=operator.index(seed), step=step)
        if squared_distance is not None:
            run = functools.partial(_measured, run, squared_distance, [], len(self._pieces))
            if not self._pieces:
                squared_distance.zero_()
        self._start(run, flag)

    def copy_(self) -> None:
        """Starts to copy every source into its averaged tensor.

        Raises:
            ValueError, RuntimeError: as :meth:`lerp_`.
        """
        self._get_ready()
        self._start(Piece.copy, None)

    def _get_ready(self) -> None:
        """The update before is done, and the pieces are those of the tensors as they are."""
        worker, update = self._current()
        if worker is not None and update is not None and not update.done.is_set():
            self._warn("an update was to start while the one before it was not finished")
            worker.wait(update.done)
        self._raise_failure()
        del update
        self._update = None  # it holds its pieces, and these their buffers
        if self._streams and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an offloaded update was started while a CUDA graph is being captured, which can't "
                "hold the work of a thread; start it outside of the graph"
            )
        self._follow()

    def _start(self, run: Callable[[Piece], None], flag: Tensor | None) -> None:
        if not self._pieces:
            return
        on_host = None
        if flag is not None:
            if self._flag is None:  # a flag on a device, and no source there
                self._flag = host_memory(torch.empty(1, device="meta"))
            self._flag.copy_(flag.reshape(1), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(flag.device))
            on_host = self._flag, arrived
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        if self._worker is None:
            self._worker = Worker()
            self._ending = weakref.finalize(self, self._worker.updates.put, None)
            self._ending.atexit = False
        self._update = OffloadedUpdate(self._pieces, run, on_host)
        self._worker.updates.put(self._update)

    def wait_until_read(self) -> None:
        """The sources may be written again after it.

        Waits until all reading is put on the devices, and makes their current streams wait for it.
        """
        worker, update = self._current()
        if worker is None or update is None:
            return
        if not update.read.is_set():
            self._warn("the sources were to be written while an update was still reading them")
            worker.wait(update.read)
        for piece in self._last_pieces:
            piece.hold_current_stream()
        self._raise_failure()

    def flush(self) -> None:
        """Waits until all started updates are in the averages."""
        worker, update = self._current()
        if worker is not None and update is not None:
            worker.wait(update.done)
            self._update = update if update.error is not None else None
        self._raise_failure()

    def is_idle(self) -> bool:
        """Whether nothing is under way, and no failure is left to be told. Waits for nothing."""
        update = self._update
        return update is None or (update.done.is_set() and update.error is None)

    def close(self) -> None:
        """Flushes and ends the thread; an update after it starts another."""
        try:
            self.flush()
        finally:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.updates.put(None)
                worker.thread.join()
            self._forget_worker()

    def _current(self) -> tuple[Worker | None, OffloadedUpdate | None]:
        """The thread and the last update, of this process."""
        if self._worker is not None and self._worker.pid != os.getpid():
            self._forget_worker()
        return self._worker, self._update

    def _forget_worker(self) -> None:
        self._worker = self._update = None
        if self._ending is not None:
            self._ending.detach()
            self._ending = None

    def _raise_failure(self) -> None:
        update = self._update
        if update is None or not update.done.is_set() or update.error is None:
            return
        error, self._update = update.error, None
        raise RuntimeError(
            f"an offloaded update failed: {type(error).__name__}: {error}. The averages hold a "
            f"part of it: {update.finished} of {len(update.pieces)} pieces are updated, perhaps a "
            f"part of the next too. Later updates go on from there; if that is not wanted, load "
            f"the averages from a checkpoint"
        ) from error

    def _warn(self, what: str) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"{what}, so the training waits: the average is slower than the step. Update it every "
            f"n steps, average fewer elements, or give it more CPU threads "
            f"(torch.set_num_threads; now {torch.get_num_threads()}). Results are right, only "
            f"slower.",
            SlowPathWarning,
            stacklevel=3,
        )


def _measured(
    average: Callable[..., None], into: Tensor, measured: list[float], pieces: int, piece: Piece
) -> None:
    """Averages a piece; after the last one writes the sum of what all of them have measured."""
    distance = torch.zeros((), dtype=torch.float64)
    average(piece, squared_distance=distance)
    measured.append(float(distance))
    if len(measured) == pieces:
        into.fill_(math.fsum(measured))
