"""Averages in host memory, updated by a thread while the model trains."""

from __future__ import annotations

import functools
import math
import operator
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ema_fused.engine.arguments import as_flag, as_weights, check_distance
from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.checks import as_integer, check_integer
from ema_fused.engine.host_memory import host_memory
from ema_fused.engine.memory import is_wrapper
from ema_fused.engine.notices import warn
from ema_fused.engine.pairs import can_average, label, refuse_average
from ema_fused.engine.parts import kind_of
from ema_fused.engine.plan import Plan
from ema_fused.engine.rounding import check_seed
from ema_fused.offloading.background import OffloadedUpdate, Worker
from ema_fused.offloading.staging import LEAST_BYTES, PairOptions, Piece, Staging

__all__ = ["OffloadedPlan", "host_memory"]

# The properties of a tensor that are compared with the plan. By map(), for speed: some 0.3
# microseconds per tensor.
_FACTS: tuple[Callable[[Tensor], Any], ...] = (
    operator.attrgetter("dtype"),
    operator.attrgetter("shape"),
    Tensor.stride,
    Tensor.data_ptr,
)


class OffloadedPlan:
    """A :class:`~ema_fused.Plan` whose averages are on the CPU and updated in the background.

    :meth:`lerp_` and :meth:`copy_` return at once. A thread copies the sources to the host, piece
    by piece through two staging buffers, and averages them there; the results are bitwise those of
    ``Plan(averaged, [s.cpu() for s in source])``. Before the sources are written again
    (``optimizer.step()``), call :meth:`wait_until_read`; before the averages are read,
    :meth:`flush`::

        loss.backward()
        plan.wait_until_read()
        optimizer.step()
        plan.lerp_(0.001)

    Updates run one at a time: the next waits for the one before, none is dropped. When the training
    has to wait, the plan warns once, by a :class:`~ema_fused.SlowPathWarning`.

    In device memory it needs the two buffers and the chunk tables (48 bytes per chunk). The
    sources' storage, also of tensors replaced since, is kept alive until the updates that read it
    are done. Only one thread at a time may use a plan. Don't capture a CUDA graph while an update
    is unfinished.

    An update that is unfinished when the plan is deleted, or when the interpreter exits, is still
    completed (at exit within a minute). After ``os.fork`` the child's plan starts its own thread,
    which works with CPU sources only; an update that is unfinished at the fork stays so in the
    child, so :meth:`flush` before the fork.

    Args:
        averaged: tensors on the CPU, as a Plan takes them; best from :func:`host_memory`.
        source: as many tensors, on CUDA devices or on the CPU.
        arithmetic, only_copy, backend, names, rounding, numbers: as a Plan takes them; ``backend``
            is that of the averages.
        staging_bytes: size of each buffer in bytes, at least 1024. Larger tensors are split, except
            where the result depends on the position of an element: 16-bit averages with stochastic
            rounding, tensors that ``foreach`` serves, and pairs whose two layouts differ or have
            gaps. The buffers grow to the largest of these.

    Attributes:
        averaged: the averaged tensors.
        source: the source of each.
        staged_bytes: the current size of one buffer, in bytes.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`~ema_fused.Plan`; also for an averaged
            tensor that isn't on the CPU, or a source that is neither on a CUDA device nor on the
            CPU.

    If the thread fails, the next call of any method raises RuntimeError, once, with the thread's
    exception as its cause. That call does nothing else, except that waiting and closing are done.
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
        staging_bytes = check_integer("staging_bytes", staging_bytes, least=LEAST_BYTES)
        self._arguments: dict[str, Any] = {
            "arithmetic": arithmetic,
            "only_copy": only_copy,
            "backend": backend,
            "names": names,
            "rounding": rounding,
            "numbers": numbers,
        }
        # A Plan checks the arguments, so that the lists can be relied on from here on.
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
        self._staging = Staging(staging_bytes)
        self._worker: Worker | None = None
        self._ending: weakref.finalize[Any, Any] | None = None
        self._update: OffloadedUpdate | None = None
        self._has_warned = False
        self._plan_pieces()

    # ---- Planning --------------------------------------------------------------------------------

    @torch.inference_mode(False)  # the thread couldn't write an inference tensor
    def _plan_pieces(self) -> None:
        # Frees the previous buffers before new ones are allocated.
        self._pieces: list[Piece] = []
        self._last_pieces: list[Piece] = []  # the last one of each stream
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
                if is_wrapper(tensor):
                    raise TypeError(
                        f"{label(i, self._options.names)}: the {which} is a "
                        f"{type(tensor).__name__}, whose elements are in other tensors; an "
                        f"OffloadedPlan takes plain tensors; keep this average where the model is "
                        f"(offload=None)"
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
        # Allocated now: pinning memory takes long, and no update should wait for it.
        self._flag = host_memory(torch.empty(1, device="meta")) if self._streams else None
        self._facts = self._current_facts()

    def _current_facts(self) -> list[list[Any]]:
        """One list per property in ``_FACTS``: of all averaged tensors, then of all sources."""
        tensors = self.averaged + self.source
        return [list(map(fact, tensors)) for fact in _FACTS]

    def _follow(self) -> None:
        """Plans again if the storage of a tensor was replaced.

        Raises:
            ValueError: a dtype or shape has changed; nothing was updated.
        """
        facts = self._current_facts()
        if facts == self._facts:
            return
        # If planning failed before, there is nothing to compare with.
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
        """The current size of one buffer, in bytes; 0 if there is nothing to update."""
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
        """Starts ``averaged = (1 - weight) * averaged + weight * source`` without synchronising.

        Args:
            weight: of the source, a number.
            found_inf: a tensor of one number: unless it is 0, this update does nothing. On a CUDA
                device it is read in the order of the current stream, without waiting.
            seed: of stochastic rounding's random bits, in [0, 2**63).
            step: the counter of those random bits, modulo 2**32.
            squared_distance: a 0-dim float64 tensor on the CPU, as :meth:`Plan.lerp_` takes it. The
                thread writes it once, when the update is done.

        Raises:
            TypeError: a pair that has no average (integers, bool) and isn't ``only_copy``; the
                weight, seed or step is no number.
            ValueError: a tensor's dtype or shape has changed.
            RuntimeError: a CUDA graph is being captured, or the thread failed (see the class).
            If an error is raised, nothing has been updated.
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
        """Starts copying every source into its averaged tensor.

        Raises:
            ValueError, RuntimeError: as :meth:`lerp_`.
        """
        self._get_ready()
        self._start(Piece.copy, None)

    def _get_ready(self) -> None:
        """Waits for the previous update, and plans again if tensors have changed."""
        worker, update = self._current()
        if worker is not None and update is not None and not update.done.is_set():
            self._warn("an update was to start while the one before it was not finished")
            worker.wait(update.done)
        self._raise_failure()
        del update
        self._update = None  # its pieces keep their buffers alive
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
            if self._flag is None:  # the flag is on a CUDA device, no source is
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
        """Waits until the sources may be written again.

        The host waits until all reads are enqueued on the devices, whose current streams then wait
        for the reads.
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
        """Whether no update is unfinished and no failure is still to be raised. Doesn't wait."""
        update = self._update
        return update is None or (update.done.is_set() and update.error is None)

    def close(self) -> None:
        """Flushes and ends the thread; a later update starts a new one."""
        try:
            self.flush()
        finally:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.updates.put(None)
                worker.thread.join()
            self._forget_worker()

    def _current(self) -> tuple[Worker | None, OffloadedUpdate | None]:
        """The thread and the last update; both None in a forked child, which has no such thread."""
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
        warn(
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
    """Averages a piece; after the last one writes the sum of the distances of all pieces."""
    distance = torch.zeros((), dtype=torch.float64)
    average(piece, squared_distance=distance)
    measured.append(float(distance))
    if len(measured) == pieces:
        into.fill_(math.fsum(measured))
