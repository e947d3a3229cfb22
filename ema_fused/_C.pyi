"""The compiled core. ``ema_fused.backends.native()`` hands it out; nothing else imports it."""

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
        """options, one a pair: (only copied, which average, its number in the caller's lists)."""
    def release(self) -> None:
        """Lets the tensors go: nothing is checked from here on but by matches()."""
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
        """The same, with all there is. found_inf and step_at are addresses of a float32 and an
        int64 on the plan's device, or 0. weights_by_average: (number, address of one that counts
        instead or 0, whether there is a float64 there, else a float32). partials: (address of
        float64 numbers on the plan's device, averages, parts of each): gets the squared distance
        between source and averages as they were, in as many parts as :attr:`partials` says. All
        are written; (0, 0, 0): nobody asks."""
    def changed(self) -> tuple[int, bool, str]:
        """(the first pair with a changed dtype or shape, or -1; is it the source; as planned)."""
    @property
    def no_average(self) -> int:
        """The first pair that has no average and isn't only copied, or -1."""
    @property
    def no_swap(self) -> int:
        """The first pair of two dtypes, or -1."""
    @property
    def elements(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def partials(self) -> int:
        """In how many parts an average's squared distance is told."""

class SlotWatch:
    """Whether dictionaries still hold the objects they held."""

    def __init__(self, dictionaries: list[dict[str, Any]]) -> None: ...
    def changed(self) -> bool: ...

def connect(
    tensor_type: type[Tensor],
    library: str,
    make_handles: Callable[[Sequence[Tensor]], Sequence[object]] | None,
) -> None:
    """Finds the doors into torch. ImportError where this torch lacks the DLPack exchange table."""

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
