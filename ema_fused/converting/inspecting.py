"""What a checkpoint holds, and how far its average is from the weights, layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ema_fused.converting.average_state import AverageState, Tensors, each_once, is_averageable
from ema_fused.converting.comparing_tensors import Looked, look
from ema_fused.converting.reading import read_average, read_tree
from ema_fused.converting.recognising_averages import WEIGHTS, NoAverageError
from ema_fused.merging.recognising import PathLike, choose
from ema_fused.merging.safetensors_layout import is_snapshot


@dataclasses.dataclass(frozen=True)
class Layer:
    """The floating-point tensors of one module together.

    Attributes:
        norm: of the average, or of the weights if there is no average.
        distance: from the average to what it is compared with; None: to nothing.
    """

    name: str
    elements: int
    norm: float
    distance: float | None

    @property
    def relative(self) -> float | None:
        """The distance as a part of the norm; of a norm of 0 infinite, unless both are 0."""
        if self.distance is None:
            return None
        if self.norm == 0:
            return math.inf if self.distance else 0.0
        return self.distance / self.norm


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` has found.

    Attributes:
        path: of the checkpoint.
        format: whose average it is; ``weights``: there is none.
        state: the average, or the weights.
        compared_with: the other side of each distance, in words; None: there is none.
        tensors: each, in the order of the checkpoint; tied ones once.
        only_here: names that the other side lacks, or has in another shape.
        only_there: names that this side lacks.
    """

    path: Path
    format: str
    state: AverageState
    compared_with: str | None
    tensors: tuple[Looked, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many elements of each dtype."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.elements
        return dict(counts)

    @property
    def layers(self) -> list[Layer]:
        """By module, in the order of the checkpoint."""
        groups: dict[str, list[Looked]] = {}
        for tensor in self.tensors:
            if is_averageable(tensor):
                groups.setdefault(tensor.name.rpartition(".")[0] or tensor.name, []).append(tensor)
        return [_layer(name, tensors) for name, tensors in groups.items()]

    @property
    def total(self) -> Layer:
        """All floating-point tensors together."""
        return _layer("all", [tensor for tensor in self.tensors if is_averageable(tensor)])

    @property
    def with_nan(self) -> list[str]:
        return [tensor.name for tensor in self.tensors if tensor.nans]

    @property
    def with_infinity(self) -> list[str]:
        return [tensor.name for tensor in self.tensors if tensor.infinities]

    @property
    def zero(self) -> list[str]:
        """Floating-point tensors in which all is 0."""
        return [
            tensor.name
            for tensor in self.tensors
            if tensor.is_zero and tensor.elements and is_averageable(tensor)
        ]

    @property
    def never_updated(self) -> list[str]:
        """Averages that are the weights, to the bit or in a wider dtype, while others differ.

        So are those of frozen parameters, and of buffers that are copied. If all are equal, the
        average has just been made, and none is named.
        """
        compared = [
            one
            for one in self.tensors
            if is_averageable(one) and one.is_equal is not None and one.elements
        ]
        equal = [one.name for one in compared if one.is_equal]
        return equal if len(equal) < len(compared) else []


def _layer(name: str, tensors: list[Looked]) -> Layer:
    distances = [tensor.apart for tensor in tensors if tensor.apart is not None]
    return Layer(
        name,
        sum(tensor.elements for tensor in tensors),
        math.sqrt(sum(tensor.squares for tensor in tensors)),
        math.sqrt(sum(distances)) if distances else None,
    )


def inspect(
    path: PathLike,
    other: PathLike | None = None,
    *,
    key: str | None = None,
    source: str | None = None,
    averages_in: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Inspection:
    """Looks at all tensors of a checkpoint, some MiB of them in memory at a time.

    Args:
        path: a file or folder; with an average, if it is one of a known format.
        other: another one to take the distance to; None: to the model's weights beside the average.
        key: where the average or the weights are in nested dictionaries; None: found.
        source: the name of the average's format; None: found.
        averages_in: of mmcv 1.x: ``"parameters"`` or ``"buffers"``.
        progress: called with the number of bytes that were read.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: it is no checkpoint, or is damaged, or holds several averages or weights.
    """
    state = _state_at(path, key, source, averages_in)
    others, compared_with = state.raw, "the weights of the model" if state.raw else None
    if other is not None:
        there = _state_at(other, key, source, averages_in)
        others, compared_with = _named(there), str(other)
    here = _named(state)
    with _one_thread():
        looked = tuple(look(dict(each_once(here)), others, progress))
    missing, more = _differences(here, others)
    return Inspection(Path(path), state.format, state, compared_with, looked, missing, more)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces are small: waiting for a second thread takes longer, where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _named(state: AverageState) -> Tensors:
    """The tensors; of a list by their numbers."""
    if state.unnamed is None:
        return state.averaged
    return {str(number): tensor for number, tensor in enumerate(state.unnamed)}


def _state_at(
    path: PathLike, key: str | None, source: str | None, averages_in: str | None
) -> AverageState:
    """The average in a checkpoint; its only weights, if it has none."""
    try:
        return read_average(path, key=key, source=source, averages_in=averages_in)
    except NoAverageError:
        if source is not None:
            raise
    tree, contents = read_tree(path)
    found = choose(dataclasses.replace(contents, tree=tree, tied={}), key)
    names = {**found.tensors, **{name: found.tensors[kept] for name, kept in found.tied.items()}}
    title, steps = _of_snapshot(found.contents.metadata)
    return AverageState(WEIGHTS, names, steps=steps, title=title, key=found.key)


def _of_snapshot(metadata: Mapping[str, str]) -> tuple[str, int | None]:
    """What says so, and the steps, of a snapshot of ``PowerFunctionEMA``; no title: it is none."""
    if not is_snapshot(metadata):
        return "", None
    title = f"ema_fused: a snapshot of PowerFunctionEMA, sigma_rel {metadata['sigma_rel']}"
    return title, int(metadata["steps"])


def _differences(here: Tensors, there: Tensors | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if there is None:
        return (), ()
    missing = [
        name
        for name, tensor in here.items()
        if name not in there or tuple(there[name].shape) != tuple(tensor.shape)
    ]
    return tuple(missing), tuple(name for name in there if name not in here)
