"""The value of an integer buffer (the number of updates, a seed), cached on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ema_fused.engine import backends


class KnownInteger:
    """Caches the value of an integer buffer; reads it again only if other code has written it.

    Reading a buffer on a device synchronises with it, so the value is also kept as a Python int.
    Writing doesn't synchronise: the buffer is written at every change and is always up to date for
    its readers (``state_dict``, DistributedDataParallel's broadcast of buffers).

    Attributes:
        counter: the compiled Counter of the buffer that was read last; None if it isn't in host
            memory, and without the extension.

    The buffer is read again if it is another object (``.to()``, ``load_state_dict(assign=True)``)
    or its version counter has moved (``fill_``, ``load_state_dict``, a broadcast).
    """

    __slots__ = ("_buffer", "_unsettled", "_value", "_version", "counter")

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._version = -1
        self._value = 0
        self.counter: Any = None
        # The flag that decides about the last count, being copied to the host, and the copy's
        # event.
        self._unsettled: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, buffer: Tensor) -> int:
        self.settle(buffer)
        if buffer is not self._buffer or buffer._version != self._version:
            self._value = int(buffer.item())
            if buffer is not self._buffer:
                self.counter = backends.counter_of(buffer)
            self._buffer = buffer
            self._version = buffer._version
        return self._value

    def write(self, buffer: Tensor, value: int) -> None:
        """Writes ``value`` into a buffer that has just been read."""
        buffer.fill_(value)
        self._value = value
        self._version = buffer._version

    def count(self, buffer: Tensor, *, unless: Tensor | None) -> None:
        """Adds 1 to a buffer that has just been read, unless that flag is set.

        The host doesn't wait now for a flag on a CUDA device. A buffer on the flag's device is
        right at once; another one may be 1 too high until :meth:`settle`.
        """
        if unless is None or not unless.is_cuda:
            if unless is None or not bool(unless):
                self.write(buffer, self._value + 1)
            return
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_((unless != 0).reshape(()), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(unless.device))
        self._unsettled = (flag, arrived)
        if buffer.device == unless.device:
            buffer.add_((unless == 0).reshape(()))
            self._value += 1
            self._version = buffer._version
        else:
            self.write(buffer, self._value + 1)

    def presumed(self, buffer: Tensor) -> int:
        """The value, unless other code has written it: for a caller that :attr:`counter` corrects.

        Reading the version counter, as :meth:`read` does, takes longer than a small update does in
        all: a training step leaves nothing of what it touches in the caches.
        """
        if buffer is self._buffer and self.counter is not None and self._unsettled is None:
            return self._value
        return self.read(buffer)

    def count_after(self, buffer: Tensor) -> None:
        """Adds 1 to a buffer that has just been read, unless :attr:`counter` has done so."""
        if self.counter is None:
            self.write(buffer, self._value + 1)
        else:
            self._value += 1

    def read_once(self, buffer: Tensor) -> int:
        """The value that this object last read or counted; replays of a CUDA graph aren't included.

        Raises:
            RuntimeError: it must be read now, and a CUDA graph is being captured.
        """
        if buffer is self._buffer and buffer._version == self._version:
            return self._value
        if buffer.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the number of updates so far isn't known while this graph is being captured; call "
                "update_parameters() before the capture, as often as it only copies (once, or "
                "begin_step times)"
            )
        return self.read(buffer)

    def count_there(self, buffer: Tensor, *, unless: Tensor | None) -> None:
        """Adds 1 on the buffer's device, unless that flag is set; doesn't synchronise."""
        if unless is None:
            buffer.add_(1)
        else:
            buffer.add_((unless == 0).reshape(()).to(buffer.device))
        self._value += 1
        self._version = buffer._version

    def settle(self, buffer: Tensor) -> None:
        """Reverts the last :meth:`count` if its flag was set.

        Waits for the flag, which usually has arrived long before the next update.
        """
        if self._unsettled is None:
            return
        flag, arrived = self._unsettled
        self._unsettled = None
        arrived.synchronize()
        if not bool(flag):
            return
        self._value -= 1
        if buffer is self._buffer and buffer._version == self._version and not buffer.is_cuda:
            self.write(buffer, self._value)
