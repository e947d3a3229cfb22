"""The models whose updates are measured on a GPU, as lists of parameter shapes."""

from __future__ import annotations

from dataclasses import dataclass

import shapes
from shapes import Shape

_LARGE_TENSOR = 1 << 24  # elements
_SDXL_DIVISOR = 4

# Floats of four bytes that a parameter takes in the largest case: its average, its source, a cast
# copy that is kept and one that isn't; or a model and two averaged models.
BYTES_A_PARAMETER = 16
# What of the free memory may be used: the allocator's rounding and the library's own want some.
MEMORY_SHARE = 0.9
LLAMA_SHARE = 0.85  # less, so that what is chosen now still fits when its turn comes


@dataclass(frozen=True)
class ModelSet:
    """A model's shapes; ``large``: so large that an update is nothing but moving memory."""

    key: str
    title: str
    shapes: list[Shape]
    large: bool = False

    @property
    def elements(self) -> int:
        return shapes.total_elements(self.shapes)


def model_sets(free_bytes: int, quick: bool) -> list[ModelSet]:
    """All sets; ``quick``: as many tensors, but tiny ones. Llama has the layers that fit memory."""
    layers = 2 if quick else llama_layers(free_bytes)
    llama = f"Llama-7B, {layers} of {shapes.LLAMA_7B_LAYERS} layers"
    sdxl = shapes.sdxl_unet(shapes.SDXL_WIDTH // _SDXL_DIVISOR)
    found = [
        ModelSet("1gb", "1 GiB", shapes.repeated(16, _LARGE_TENSOR), large=True),
        ModelSet("8gb", "8 GiB", shapes.repeated(128, _LARGE_TENSOR), large=True),
        ModelSet("resnet50", "ResNet-50", shapes.resnet50()),
        ModelSet("vit_l_16", "ViT-L/16", shapes.vit_l_16(), large=True),
        ModelSet("llama_7b", llama, shapes.llama_7b(layers), large=True),
        ModelSet("sdxl_unet", f"SDXL UNet, widths / {_SDXL_DIVISOR}", sdxl),
    ]
    if quick:
        found = [
            ModelSet(s.key, s.title, shapes.capped(s.shapes, 64 if s.large else 4), s.large)
            for s in found
        ]
    return found


def llama_layers(free_bytes: int) -> int:
    """The most layers whose largest case fits the memory; at least one."""
    fitting = int(free_bytes * LLAMA_SHARE) // BYTES_A_PARAMETER
    ends = shapes.total_elements(shapes.llama_7b(0))
    layer = shapes.total_elements(shapes.llama_7b(1)) - ends
    return max(1, min(shapes.LLAMA_7B_LAYERS, (fitting - ends) // layer))
