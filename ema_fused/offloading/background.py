"""The thread that brings pieces over and averages them, and what its caller waits for."""

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
_LOOK_SECONDS = 1.0  # how often who waits looks whether the thread is alive


class OffloadedUpdate:
    """One pass over the pieces, which the thread carries out and the caller waits for.

    Args:
        pieces: all of them.
        run: what is done with a piece once it is staged.
        flag: found_inf on its way to the host, and the event of its arrival.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        run: Callable[[Piece], None],
        flag: tuple[Tensor, torch.cuda.Event] | None,
    ) -> None:
        self.pieces = pieces
        self.read = threading.Event()  # nothing more of the sources will be asked for
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
        """False where found_inf was set: then nothing is done with any piece."""
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
        """Nothing reads the sources any more once this returns."""
        for stream in {piece.stream for piece in self.pieces if piece.stream is not None}:
            try:
                stream.synchronize()
            except RuntimeError:
                return  # the device has failed; the first error tells more


class Worker:
    """A thread that carries out one update after the other. It holds none that is done."""

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
            del update  # first, so that its pieces go when the plan lets them go
            done.set()

    def wait(self, event: threading.Event) -> None:
        """Waits, open to KeyboardInterrupt."""
        while not event.wait(_LOOK_SECONDS):
            if not self.thread.is_alive() and not event.is_set():
                raise RuntimeError(
                    "the thread of an offloaded update has ended with the update unfinished; the "
                    "averages may hold a part of it"
                )


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _finish_at_exit() -> None:
    """A daemon thread that is stopped within a kernel could take the interpreter down."""
    for worker in list(_workers):
        worker.updates.put(None)
        worker.thread.join(_EXIT_SECONDS)
