"""Updates on a CUDA stream of the caller's choice, ordered with everything around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStreams:
    """The updates of one plan that were started on other streams than the current one.

    An update waits for what the current stream holds when it starts. Whatever comes after it on
    another stream has to wait for it: :meth:`wait`.
    """

    def __init__(self) -> None:
        self.unfinished: dict[torch.device, torch.cuda.Event] = {}

    @contextmanager
    def running_on(self, stream: torch.cuda.Stream, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Makes ``stream`` current for the block, in order with the stream that was.

        In a capture the stream that was waits for the block at once: a graph is whole.

        Args:
            stream: of any CUDA device.
            tensors: what the block uses. Their memory isn't given to others before the stream has
                done with it, whoever frees them. (Told at every update: nothing distinguishes new
                memory from the old if it lies at the same address.)
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
            # Also where something was raised: a part of it may be under way.
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
            RuntimeError: a graph is being captured, which can't wait for what it doesn't hold.
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
            # As long as it isn't done, other streams may have to wait for it as well.
            if event.query():
                del self.unfinished[device]
