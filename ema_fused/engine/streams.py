"""Updates on a CUDA stream of the caller's choice, synchronised with the current stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStreams:
    """The updates of one plan that run on streams other than the current one.

    An update waits for the work that the current stream holds when it starts. Later work on another
    stream must wait for the update: :meth:`wait`.
    """

    def __init__(self) -> None:
        self.unfinished: dict[torch.device, torch.cuda.Event] = {}

    @contextmanager
    def running_on(self, stream: torch.cuda.Stream, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Makes ``stream`` current for the block; it first waits for the previous current stream.

        While a CUDA graph is captured, the previous stream waits for the block right away: a
        capture must join all its streams.

        Args:
            stream: of any CUDA device.
            tensors: the tensors that the block uses. If they are freed, the caching allocator
                doesn't reuse their memory until ``stream`` has finished. (Recorded at every update:
                new memory at an old address can't be told from the old memory.)
        """
        here = torch.cuda.current_stream(stream.device)
        with torch.cuda.stream(here):
            is_captured = torch.cuda.is_current_stream_capturing()
        self.wait(stream)
        stream.wait_stream(here)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            # After an error too: a part of the update may already be running.
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            if is_captured:
                here.wait_stream(stream)
            else:
                self.unfinished[stream.device] = stream.record_event()

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Makes ``stream``, or each device's current one, wait for the unfinished updates.

        Raises:
            RuntimeError: a CUDA graph is being captured; it can't wait for work outside the graph.
        """
        if not self.unfinished:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an update that was given another stream may be unfinished, and a graph that is "
                "being captured can't wait for it; call plan.wait() before the capture"
            )
        for device, event in list(self.unfinished.items()):
            waiting = torch.cuda.current_stream(device) if stream is None else stream
            waiting.wait_event(event)
            # Kept until the update has finished: other streams may have to wait for it too.
            if event.query():
                del self.unfinished[device]


def check_stream(stream: object, averaged: Sequence[Tensor]) -> None:
    """Raises TypeError or ValueError unless all of ``averaged`` can be updated on ``stream``."""
    if not isinstance(stream, torch.cuda.Stream):
        raise TypeError(f"the stream is {stream!r}; a torch.cuda.Stream is expected")
    elsewhere = [t.device for t in averaged if t.is_cuda and t.device != stream.device]
    if elsewhere:
        raise ValueError(
            f"the stream is on {stream.device} and the plan has tensors on {elsewhere[0]} too; "
            f"make a Plan for each device"
        )
