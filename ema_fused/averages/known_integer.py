"""An integer in a buffer (the number of updates, a seed), known without asking a device for it."""

from __future__ import annotations

import torch
from torch import Tensor


class KnownInteger:
    """The value of an integer buffer, read only when somebody else has written it.

    Reading a buffer on an accelerator waits for everything queued there, so the value is kept as a
    Python int beside it. Writing needs no waiting: the buffer is written at every change and is
    always right, whoever reads it (``state_dict``, DistributedDataParallel's broadcast of buffers).

    The buffer is read again when it is another object (``.to()``, ``load_state_dict(assign=True)``)
    or its version counter has moved (``fill_``, ``load_state_dict``, a broadcast).
    """

    __slots__ = ("_buffer", "_unsettled", "_value", "_version")

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._version = -1
        self._value = 0
        # Whether the last change was to be, on its way to the host: (the flag there, its event).
        self._unsettled: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, buffer: Tensor) -> int:
        self.settle(buffer)
        if buffer is not self._buffer or buffer._version != self._version:
            self._value = int(buffer.item())
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

        A flag on a CUDA device is not waited for now: until :meth:`settle` a buffer elsewhere may
        be 1 too high; one beside the flag is right at once.
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

    def read_once(self, buffer: Tensor) -> int:
        """The value when this object last read or counted it; replays of a graph have added to it.

        Raises:
            RuntimeError: it must be read now, and a graph is being captured.
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
        """Adds 1 on the buffer's device, unless that flag is set; nothing is waited for."""
        if unless is None:
            buffer.add_(1)
        else:
            buffer.add_((unless == 0).reshape(()).to(buffer.device))
        self._value += 1
        self._version = buffer._version

    def settle(self, buffer: Tensor) -> None:
        """Takes back the last :meth:`count` where its flag was set.

        Waits for that flag: by the next update the device has long passed it.
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
