"""The lists of parameter shapes that the benchmarks measure on.

Each is one corner of what an averaged update meets: a real network, a few tensors far larger than
any cache, many tensors that fit a cache, and many so small that only the cost of a call is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shape = tuple[int, ...]

# The four stages of ResNet-50 (He et al. 2015, arXiv 1512.03385, table 1): the width of the
# 3 x 3 convolutions, and the number of bottleneck blocks.
_RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_BOTTLENECK_EXPANSION = 4


def resnet50() -> list[Shape]:
    """The 161 parameter shapes of ResNet-50 with 1,000 classes, in order: 25,557,032 elements."""
    shapes = _convolution_and_norm(64, 3, 7)
    channels = 64
    for width, blocks in _RESNET50_STAGES:
        wide = width * _BOTTLENECK_EXPANSION
        for block in range(blocks):
            shapes += _convolution_and_norm(width, channels, 1)
            shapes += _convolution_and_norm(width, width, 3)
            shapes += _convolution_and_norm(wide, width, 1)
            if block == 0:  # the shortcut is projected where the number of channels changes
                shapes += _convolution_and_norm(wide, channels, 1)
            channels = wide
    return [*shapes, (1000, channels), (1000,)]


def _convolution_and_norm(out_channels: int, in_channels: int, size: int) -> list[Shape]:
    """A convolution without bias, then batch norm's weight and bias."""
    return [(out_channels, in_channels, size, size), (out_channels,), (out_channels,)]


def repeated(count: int, elements: int) -> list[Shape]:
    """``count`` flat tensors of ``elements`` elements each."""
    return [(elements,)] * count


def total_elements(shapes: Sequence[Shape]) -> int:
    """How many elements tensors of these shapes hold together."""
    return sum(math.prod(shape) for shape in shapes)


SHAPE_SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "1000x1024": lambda: repeated(1000, 1024),
    "1000x16": lambda: repeated(1000, 16),
    "large": lambda: repeated(8, 20_000_000),
}

# "large" is asked for by name: with all contenders' copies it wants about 4 GB of memory.
DEFAULT_SETS = ("resnet50", "1000x1024", "1000x16")

# For the benchmark's own tests: the same shapes of problem, too small to take time.
SMOKE_SETS: dict[str, Callable[[], list[Shape]]] = {
    "smoke-mixed": lambda: [(8, 3, 3, 3), (8,), (), (0,), (17, 5)],
    "smoke-20x16": lambda: repeated(20, 16),
}
