"""An integer in a buffer (the number of updates, a seed), known without asking a device for it."""

from __future__ import annotations

from torch import Tensor


class KnownInteger:
    """The value of an integer buffer, read only when somebody else has written it.

    Reading a buffer on an accelerator waits for everything queued there, so the value is kept as a
    Python int beside it. Writing needs no waiting: the buffer is written at every change and is
    always right, whoever reads it (``state_dict``, DistributedDataParallel's broadcast of buffers).

    The buffer is read again when it is another object (``.to()``, ``load_state_dict(assign=True)``)
    or its version counter has moved (``fill_``, ``load_state_dict``, a broadcast).
    """

    __slots__ = ("_buffer", "_value", "_version")

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._version = -1
        self._value = 0

    def read(self, buffer: Tensor) -> int:
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
