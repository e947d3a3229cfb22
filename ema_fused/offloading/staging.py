"""Copies sources to averages in host memory, in pieces that fit a staging buffer.

    sources -> packed into one buffer (device) -> one copy to the host -> averaged from there

A piece is as many tensors, or flat slices of tensors, as a buffer holds, each in its source's own
dtype. Two buffers take turns: while one piece is copied to the host, the one before it is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_fused.engine import backends
from ema_fused.engine.host_memory import host_memory
from ema_fused.engine.pairs import label
from ema_fused.engine.plan import Plan
from ema_fused.engine.rounding import HALVES

LEAST_BYTES = 1024  # smallest buffer: holds a slice of any dtype

_ALIGNMENT = 64  # bytes: staged tensors begin at multiples of it, a cache line
_SLICE = 64  # elements: sizes of slices are multiples of it, to stay aligned


class PairOptions(NamedTuple):
    """Options as :class:`~ema_fused.Plan` takes them; lists have one item per pair."""

    arithmetic: str
    rounding: str
    backend: str | None
    only_copy: Sequence[bool]
    numbers: Sequence[int]
    names: Sequence[str] | None


class _Item(NamedTuple):
    """A pair, or a flat slice of one, and its offset in a buffer."""

    pair: int
    averaged: Tensor
    source: Tensor
    strides: tuple[int, ...]  # of the staged source: the strides of source.cpu()
    offset: int = 0  # in bytes

    @property
    def bytes(self) -> int:
        return self.source.numel() * self.source.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether the source can be staged as one contiguous block of memory."""
        source = self.source
        return self.strides == source.stride() and not (source.is_conj() or source.is_neg())

    @property
    def is_flat(self) -> bool:
        """Whether both sides are contiguous memory with their elements in the same order."""
        averaged, source = self.averaged, self.source
        strides = zip(source.shape, averaged.stride(), source.stride(), strict=True)
        same = all(size == 1 or ours == theirs for size, ours, theirs in strides)
        return same and self.is_dense and not (averaged.is_conj() or averaged.is_neg())

    def staged(self, buffer: Tensor) -> Tensor:
        flat = buffer[self.offset : self.offset + self.bytes].view(self.source.dtype)
        return flat.as_strided(self.source.shape, self.strides)

    def part(self, begin: int, end: int, offset: int) -> _Item:
        """The slice of elements ``begin`` to ``end``, in memory order."""
        averaged, source = (_flat(tensor)[begin:end] for tensor in (self.averaged, self.source))
        return _Item(self.pair, averaged, source, (1,), offset)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def _distinct_items(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> list[_Item]:
    """The pairs to update: tied ones once, none whose two sides are the same memory, none empty.

    They consist of aliases (``detach()``): when a tensor's storage is replaced (``.data = other``),
    its alias keeps the planned storage.
    """
    seen = set()
    items = []
    for i, (a, s) in enumerate(zip(averaged, source, strict=True)):
        item = _Item(i, a.detach(), s.detach(), s.detach().to("meta").stride())
        places = [(t.device, t.data_ptr(), t.dtype) for t in (a, s)]
        # For flat pairs only the number of elements matters, not the shape.
        layout = a.numel() if item.is_flat else (a.shape, a.stride(), s.stride())
        if a.numel() == 0 or (*places, layout) in seen:
            continue
        seen.add((*places, layout))
        if places[0] != places[1] or a.stride() != s.stride():
            items.append(item)
    return items


def _can_be_cut(item: _Item, options: PairOptions) -> bool:
    """Whether updating slices gives bitwise the result of updating the whole tensor.

    Not if the result depends on an element's position in the tensor: the random bits of stochastic
    rounding are counted from its beginning, and torch's own loops may round the last elements
    differently.
    """
    averaged, source = item.averaged, item.source
    if not item.is_flat:
        return False
    if options.only_copy[item.pair]:
        return True
    if options.rounding == "stochastic" and averaged.dtype in HALVES:
        return False
    first = [_flat(averaged)[:1]]
    trial = Plan(
        first,
        [torch.empty(1, dtype=source.dtype)],
        arithmetic=options.arithmetic,
        backend=options.backend,
    )
    return trial.backends == ("cpu",)


def _cut_up(items: Sequence[_Item], staging_bytes: int, options: PairOptions) -> list[list[_Item]]:
    """The items of each piece, in the order of the lists; a piece has sources on one device."""
    whole = [t.bytes for t in items if t.bytes > staging_bytes and not _can_be_cut(t, options)]
    room = max([staging_bytes, *whole])
    pieces: list[list[_Item]] = []
    used = room  # used bytes of the last piece; full, so that the first item begins a piece
    for item in items:
        if pieces and item.source.device != pieces[-1][0].source.device:
            used = room
        count, begin = item.source.numel(), 0
        while begin < count:
            offset = -(-used // _ALIGNMENT) * _ALIGNMENT
            fitting = max(room - offset, 0) // item.source.itemsize
            if fitting >= count - begin:
                fitting = count - begin
            else:
                fitting -= fitting % _SLICE
                if fitting and not _can_be_cut(item, options):
                    fitting = 0
            if fitting == 0:
                pieces.append([])
                used = 0
                continue
            end = begin + fitting
            part = item.part(begin, end, offset) if fitting < count else item
            pieces[-1].append(part._replace(offset=offset))
            used = offset + part.bytes
            begin = end
    return pieces


class Piece:
    """The items that are staged in a buffer together, and the plans for them.

    Args:
        items: pairs or slices, with sources on one device.
        host: the staging buffer on the host, uint8.
        on_device: the buffer on the sources' device; None if the sources are on the host.
        stream: the stream to pack and copy on; None if the sources are on the host.
        options: of the pairs.
    """

    def __init__(
        self,
        items: Sequence[_Item],
        host: Tensor,
        on_device: Tensor | None,
        stream: torch.cuda.Stream | None,
        options: PairOptions,
    ) -> None:
        self.stream = stream
        used = max(item.offset + item.bytes for item in items)
        self._host = host[:used]
        packed = self._host if on_device is None else on_device[:used]
        self._on_device = packed
        self._packs = _packs(items, packed, options.backend)
        pairs = [item.pair for item in items]
        self._update = Plan(
            [item.averaged for item in items],
            [item.staged(self._host) for item in items],
            arithmetic=options.arithmetic,
            only_copy=[options.only_copy[i] for i in pairs],
            backend=options.backend,
            names=[label(i, options.names) for i in pairs],
            rounding=options.rounding,
            numbers=[options.numbers[i] for i in pairs],
        )
        self._packed = None if stream is None else torch.cuda.Event()
        # A blocking event: the waiting thread sleeps instead of using its core.
        self._arrived = None if stream is None else torch.cuda.Event(blocking=True)

    @property
    def buffer_bytes(self) -> int:
        return self._host.numel()

    def stage(self) -> None:
        """Starts copying the sources to the host's buffer; from the CPU, copies them at once."""
        if self.stream is None or self._packed is None or self._arrived is None:
            self._pack()
            return
        with torch.cuda.stream(self.stream):
            self._pack()
            self._packed.record(self.stream)
            self._host.copy_(self._on_device, non_blocking=True)
            self._arrived.record(self.stream)

    def _pack(self) -> None:
        for pack in self._packs:
            pack.copy_()

    def wait(self) -> None:
        """Waits until the host's buffer is filled."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def hold_current_stream(self) -> None:
        """Makes the device's current stream wait until the sources have been read."""
        if self.stream is not None and self._packed is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self._packed)

    def average(
        self, weight: float, seed: int, step: int, squared_distance: Tensor | None = None
    ) -> None:
        """Averages from the host's buffer; ``squared_distance`` as :meth:`Plan.lerp_` takes it."""
        if self._update.rounding == "stochastic":
            self._update.load_state_dict({"seed": seed, "step": step})
        self._update.lerp_(weight, squared_distance=squared_distance)

    def copy(self) -> None:
        """Copies from the host's buffer."""
        self._update.copy_()


def _packs(items: Sequence[_Item], buffer: Tensor, backend: str | None) -> list[Plan]:
    """The plans that fill a buffer; a backend pinned for the averages need not fit its device."""
    pin = backends.pinned(backend)
    native = None if pin is None else "foreach" if pin == "foreach" else buffer.device.type
    plans = []
    for is_dense, packing in ((True, native), (False, pin and "foreach")):
        some = [item for item in items if item.is_dense == is_dense]
        if some:
            sources = [item.source for item in some]
            plans.append(Plan([item.staged(buffer) for item in some], sources, backend=packing))
    return plans


class Staging:
    """The streams and buffers that pieces go through.

    Args:
        staging_bytes: size of each buffer: two on the host, and two on each CUDA device with
            sources. They are smaller if less is needed, and larger if a larger tensor can't be
            split.
    """

    def __init__(self, staging_bytes: int) -> None:
        self._bytes = staging_bytes
        # Kept, because the caching allocator reuses memory per stream: new buffers then reuse that
        # of old ones.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def pieces(
        self, averaged: Sequence[Tensor], source: Sequence[Tensor], options: PairOptions
    ) -> list[Piece]:
        """The pieces of checked pairs, to be staged and averaged one after another.

        As two buffers take turns, a piece must not be staged before the second-last one is
        averaged.
        """
        cut = _cut_up(_distinct_items(averaged, source), self._bytes, options)
        size = max((items[-1].offset + items[-1].bytes for items in cut), default=0)
        model = torch.empty(size, dtype=torch.uint8, device="meta")
        hosts = [host_memory(model) for _ in cut[:2]]
        on_devices: dict[tuple[torch.device, int], Tensor] = {}
        pieces = []
        for i, items in enumerate(cut):
            device, turn = items[0].source.device, i % 2
            arguments: tuple[Any, Any] = (None, None)
            if device.type == "cuda":
                stream = self._streams.get(device)
                if stream is None:
                    stream = self._streams[device] = torch.cuda.Stream(device)
                if (device, turn) not in on_devices:
                    with torch.cuda.stream(stream):
                        on_devices[device, turn] = torch.empty_like(model, device=device)
                arguments = on_devices[device, turn], stream
            pieces.append(Piece(items, hosts[turn], *arguments, options))
        return pieces
