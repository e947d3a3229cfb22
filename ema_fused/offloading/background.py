"""The thread that copies pieces to the host and averages them, and the events to wait for."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ema_fused.offloading.staging import Piece

_EXIT_SECONDS = 60.0  # how long the interpreter's exit waits for an unfinished update
_LOOK_SECONDS = 1.0  # between checks whether the thread is alive


class OffloadedUpdate:
    """One pass over the pieces: the thread runs it, and the caller can wait for its events.

    Args:
        pieces: all of them.
        run: called with each piece once it is staged.
        flag: the tensor that ``found_inf`` is copied to on the host, and the event after that copy.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        run: Callable[[Piece], None],
        flag: tuple[Tensor, torch.cuda.Event] | None,
    ) -> None:
        self.pieces = pieces
        self.read = threading.Event()  # all reads of the sources are enqueued
        self.done = threading.Event()
        self.finished = 0  # pieces
        self.error: BaseException | None = None
        self._run = run
        self._flag = flag

    def carry_out(self) -> None:
        try:
            before: Piece | None = None
            for piece in self.pieces:
                piece.stage()
                if before is not None and not self._finish(before):
                    return
                before = piece
            self.read.set()
            if before is not None:
                self._finish(before)
        except BaseException as error:
            self.error = error
            self._come_to_rest()
        finally:
            self.read.set()

    def _finish(self, piece: Piece) -> bool:
        """Waits for a piece and runs it; False if found_inf is set: then no piece is run."""
        piece.wait()
        if self._flag is not None and self.finished == 0:
            flag, arrived = self._flag
            arrived.synchronize()
            if bool(flag):
                return False
        self._run(piece)
        self.finished += 1
        return True

    def _come_to_rest(self) -> None:
        """After an error: waits until nothing reads the sources any more."""
        for stream in {piece.stream for piece in self.pieces if piece.stream is not None}:
            try:
                stream.synchronize()
            except RuntimeError:
                return  # the device has failed; the first error says why


class Worker:
    """A thread that runs updates one after another. It keeps no reference to a finished one."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Its put() takes no lock: a finalizer may call it at any time, from any thread.
        self.updates: queue.SimpleQueue[OffloadedUpdate | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="ema_fused offload", daemon=True)
        self.thread.start()
        _workers.add(self)

    def _work(self) -> None:
        while True:
            update = self.updates.get()
            if update is None:
                return
            update.carry_out()
            done = update.done
            del update  # before done is set, so that only the plan keeps the pieces alive
            done.set()

    def wait(self, event: threading.Event) -> None:
        """Waits for ``event``; can be interrupted by KeyboardInterrupt."""
        while not event.wait(_LOOK_SECONDS):
            if not self.thread.is_alive() and not event.is_set():
                raise RuntimeError(
                    "the thread of an offloaded update has ended with the update unfinished; the "
                    "averages may hold a part of it"
                )


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _finish_at_exit() -> None:
    """Joins the threads: a daemon thread stopped inside a kernel could crash the interpreter."""
    for worker in list(_workers):
        worker.updates.put(None)
        worker.thread.join(_EXIT_SECONDS)
