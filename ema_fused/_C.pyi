"""The compiled core. Only ``ema_fused.engine.backends`` imports it; its ``native()`` returns it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

class OverlapError(ValueError):
    """Pairs overlap in memory: args are (first pair, second pair, what overlaps)."""

class Operation:
    AVERAGE: Operation
    COPY: Operation
    SWAP: Operation

class Arithmetic:
    LERP: Arithmetic
    AXPBY: Arithmetic
    DELTA: Arithmetic
    PRODUCTS: Arithmetic
    STOCHASTIC: Arithmetic

CHUNK_ELEMENTS_CPU: int
MAX_AVERAGES: int

class Plan:
    """Pairs of one device that inspect() accepted."""

    def __init__(
        self,
        averaged: list[Tensor],
        source: list[Tensor],
        options: Sequence[tuple[bool, int, int]],
        arithmetic: Arithmetic,
    ) -> None:
        """options, one per pair: (only copied, which average, its number in the caller's lists)."""
    def release(self) -> None:
        """Drops the references to the tensors; afterwards only matches() checks anything."""
    def matches(self, averaged: list[Tensor], source: list[Tensor]) -> bool:
        """Whether these are what was planned: memory, dtype, shape, strides, device."""
    def ready(self) -> bool:
        """False where a tensor's dtype, shape, strides or device has changed."""
    def run(self, operation: Operation, weight: float = ...) -> bool:
        """Checks, rebuilds the table where tensors have moved, launches. False: as ready()."""
    def run_with(
        self,
        operation: Operation,
        weight: float,
        weights_by_average: Sequence[tuple[float, int, bool]],
        weights_by_pair: Sequence[float],
        found_inf: int,
        seed: int,
        step: int,
        step_at: int,
        partials: tuple[int, int, int],
    ) -> bool:
        """run() with all options. found_inf and step_at are addresses of a float32 and an int64 on
        the plan's device, or 0. weights_by_average: (number, address of a weight to use instead or
        0, whether that is a float64; else it is a float32). partials: (address of float64 numbers
        on the plan's device, averages, sums per average) for the squared distance between source
        and averages before the update, as :attr:`partials` sums per average. All are written. (0,
        0, 0): not measured."""
    def update_model(
        self,
        weight: float,
        averaged: SlotWatch,
        model: SlotWatch,
        counter: Counter | None,
        steps: int,
    ) -> bool:
        """run() of an average, counted if there is a counter. False, with nothing done: also where
        a watch tells of a change, or the counter isn't at ``steps``."""
    def changed(self) -> tuple[int, bool, str]:
        """(first pair with a changed dtype or shape or -1, is it the source, what was planned)."""
    @property
    def no_average(self) -> int:
        """The first pair that has no average and isn't only copied, or -1."""
    @property
    def no_swap(self) -> int:
        """The first pair whose dtypes differ, or -1."""
    @property
    def elements(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def partials(self) -> int:
        """How many partial sums the squared distance of one average is written as."""

class SlotWatch:
    """Whether dictionaries still hold the objects they held, and DTensors their shards."""

    method: str
    """How a write is noticed: "versions" up to Python 3.11, "watcher" from 3.12 on; "slots" where
    none is left, and every slot is looked at."""

    def __init__(self, dictionaries: list[dict[str, Any]], sharded: list[Tensor]) -> None: ...
    def changed(self) -> bool: ...

class Counter:
    """The number in a tensor of one int64 in host memory, for :meth:`Plan.update_model`."""

    def __init__(self, tensor: Tensor) -> None:
        """ValueError: any other tensor."""

def connect(
    tensor_type: type[Tensor],
    parameter_type: type[Tensor],
    library: str,
    make_handles: Callable[[Sequence[Tensor]], Sequence[object]] | None,
) -> None:
    """Looks up torch's C functions. ImportError if this torch lacks the DLPack exchange table."""

def missing_doors() -> str: ...
def build_info() -> dict[str, str]: ...
def cpu_isa() -> str: ...
def cuda_devices() -> tuple[int, str]: ...
def why_not_on_cuda(device: int) -> str: ...
def chunk_table(
    pairs: Sequence[tuple[int, int, int, int, int]], chunk_elements: int
) -> list[tuple[int, int, int, int]]:
    """(averaged address, source address, elements, pair) of every chunk of pairs given as
    (averaged address, source address, elements, averaged dtype code, source dtype code)."""

def inspect(
    averaged: list[Tensor], source: list[Tensor]
) -> tuple[list[tuple[int, str]], list[tuple[int, int, list[int]]]]:
    """(refused pairs with reasons, (DLPack device type, device index, pairs) for the others)."""
