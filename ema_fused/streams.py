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
        self._recorded: set[tuple[int, int]] = set()

    @contextmanager
    def running_on(
        self, stream: torch.cuda.Stream, tensors: Sequence[Tensor], generation: int
    ) -> Iterator[None]:
        """Makes ``stream`` current for the block, in order with the stream that was.

        Args:
            stream: of any CUDA device.
            tensors: what the block uses. Their memory isn't given to others before the stream has
                done with it, whoever frees them.
            generation: another number whenever the memory of the tensors is another.
        """
        here = torch.cuda.current_stream(stream.device)
        stream.wait_stream(here)
        self.wait(stream)
        with torch.cuda.stream(stream):
            yield
        mark = (stream.cuda_stream, generation)
        if mark not in self._recorded:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            self._recorded.add(mark)
        self.unfinished[stream.device] = stream.record_event()

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Makes ``stream``, or each device's current one, wait for the unfinished updates."""
        if stream is not None:
            event = self.unfinished.get(stream.device)
            if event is not None:
                stream.wait_event(event)
            return
        for device, event in self.unfinished.items():
            torch.cuda.current_stream(device).wait_event(event)
        self.unfinished.clear()
