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


# ViT-L/16 (Dosovitskiy et al. 2020, arXiv 2010.11929, table 1) on 224 x 224 images.
_VIT_WIDTH, _VIT_LAYERS, _VIT_MLP, _VIT_PATCH, _VIT_POSITIONS = 1024, 24, 4096, 16, 14 * 14 + 1


def vit_l_16() -> list[Shape]:
    """The 296 parameter shapes of ViT-L/16 with 1,000 classes: 304,326,632 elements."""
    width = _VIT_WIDTH
    shapes: list[Shape] = [(1, 1, width), (width, 3, _VIT_PATCH, _VIT_PATCH), (width,)]
    shapes.append((1, _VIT_POSITIONS, width))
    for _ in range(_VIT_LAYERS):
        shapes += _norm(width) + _linear(3 * width, width) + _linear(width, width)
        shapes += _norm(width) + _linear(_VIT_MLP, width) + _linear(width, _VIT_MLP)
    return [*shapes, *_norm(width), *_linear(1000, width)]


LLAMA_7B_LAYERS = 32
_LLAMA_WIDTH, _LLAMA_MLP, _LLAMA_VOCABULARY = 4096, 11_008, 32_000


def llama_7b(layers: int = LLAMA_7B_LAYERS) -> list[Shape]:
    """The parameter shapes of Llama-7B (Touvron et al. 2023, arXiv 2302.13971), or fewer layers.

    All 32 layers: 291 tensors, 6,738,415,616 elements.
    """
    width = _LLAMA_WIDTH
    block: list[Shape] = [(width, width)] * 4
    block += [(_LLAMA_MLP, width)] * 2 + [(width, _LLAMA_MLP)] + [(width,)] * 2
    ends: list[Shape] = [(_LLAMA_VOCABULARY, width), (width,), (_LLAMA_VOCABULARY, width)]
    return ends[:1] + block * layers + ends[1:]


# GPT-2 small (Radford et al. 2019), as Hugging Face's GPT2Model holds it: linear layers transposed.
_GPT2_WIDTH, _GPT2_LAYERS, _GPT2_VOCABULARY, _GPT2_POSITIONS = 768, 12, 50_257, 1024


def gpt2_small() -> list[Shape]:
    """The 148 parameter shapes of GPT-2 small: 124,439,808 elements."""
    width = _GPT2_WIDTH
    shapes: list[Shape] = [(_GPT2_VOCABULARY, width), (_GPT2_POSITIONS, width)]
    for _ in range(_GPT2_LAYERS):
        shapes += [*_norm(width), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [*_norm(width), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return shapes + _norm(width)


SDXL_WIDTH = 320
_SDXL_TEXT, _SDXL_POOLED = 2048, 2816  # what a token and the pooled conditions are described by


def sdxl_unet(width: int = SDXL_WIDTH) -> list[Shape]:
    """The 1,680 parameter shapes of SDXL's UNet (Podell et al. 2023, arXiv 2307.01952).

    At its own width of 320 it holds 2,567,463,684 elements; other widths scale every layer and the
    widths of the conditions alike, so that the tensors are as many and as unequal, only smaller.
    """
    levels = ((width, 0), (2 * width, 2), (4 * width, 10))  # channels, transformer blocks
    context, pooled = _SDXL_TEXT * width // SDXL_WIDTH, _SDXL_POOLED * width // SDXL_WIDTH
    time = 4 * width
    shapes = _convolution(width, 4)
    for inputs in (width, pooled):  # the embeddings of the time and of the pooled conditions
        shapes += _linear(time, inputs) + _linear(time, time)

    skips, channels = [width], width  # what the way up concatenates, last in first out
    for level, (wide, depth) in enumerate(levels):
        for _ in range(2):
            shapes += _residual(wide, channels, time) + _transformer(wide, context, depth)
            channels = wide
            skips.append(wide)
        if level < len(levels) - 1:
            shapes += _convolution(wide, wide)
            skips.append(wide)

    shapes += _residual(channels, channels, time)
    shapes += _transformer(channels, context, levels[-1][1]) + _residual(channels, channels, time)

    for level, (wide, depth) in reversed(list(enumerate(levels))):
        for _ in range(3):
            shapes += _residual(wide, channels + skips.pop(), time)
            shapes += _transformer(wide, context, depth)
            channels = wide
        if level > 0:
            shapes += _convolution(wide, wide)
    return [*shapes, *_norm(width), *_convolution(4, width)]


def _residual(out_channels: int, in_channels: int, time: int) -> list[Shape]:
    """Two normed 3 x 3 convolutions around the time's projection; 1 x 1 where widths change."""
    shapes = _norm(in_channels) + _convolution(out_channels, in_channels)
    shapes += _linear(out_channels, time)
    shapes += _norm(out_channels) + _convolution(out_channels, out_channels)
    if in_channels != out_channels:
        shapes += _convolution(out_channels, in_channels, 1)
    return shapes


def _transformer(width: int, context: int, depth: int) -> list[Shape]:
    """``depth`` blocks of self-attention, cross-attention and a gated MLP, between projections."""
    if depth == 0:
        return []
    block: list[Shape] = []
    for keys in (width, context):
        block += [*_norm(width), (width, width), (width, keys), (width, keys)]
        block += _linear(width, width)
    block += _norm(width) + _linear(8 * width, width) + _linear(width, 4 * width)
    return _norm(width) + _linear(width, width) + block * depth + _linear(width, width)


def _convolution(out_channels: int, in_channels: int, size: int = 3) -> list[Shape]:
    return [(out_channels, in_channels, size, size), (out_channels,)]


def _linear(outputs: int, inputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def capped(shapes: Sequence[Shape], longest: int) -> list[Shape]:
    """As many tensors of as many dimensions, none longer than ``longest``: for rehearsals."""
    return [tuple(min(length, longest) for length in shape) for shape in shapes]


def repeated(count: int, elements: int) -> list[Shape]:
    """``count`` flat tensors of ``elements`` elements each."""
    return [(elements,)] * count


def total_elements(shapes: Sequence[Shape]) -> int:
    """How many elements tensors of these shapes hold together."""
    return sum(math.prod(shape) for shape in shapes)


SHAPE_SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "gpt2-small": gpt2_small,
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
