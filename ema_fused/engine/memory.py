"""Which memory a tensor's elements are in, also where a subclass holds other tensors inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_wrapper(tensor: Tensor) -> bool:
    """Whether ``tensor`` is of a subclass that keeps its elements elsewhere, in tensors inside.

    (``torch.Tensor._make_wrapper_subclass``, as for torchao's weights.) It has no address, and only
    its own operations read and write it.
    """
    if type(tensor) is Tensor or type(tensor) is nn.Parameter or tensor.numel() == 0:
        return False
    try:
        return tensor.data_ptr() == 0
    except RuntimeError:  # torch's, where there is no storage
        return True


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same elements in the same memory, read in the same way.

    Compare it only while both tensors are alive: of a sparse tensor, and of a wrapper that doesn't
    say what is inside (``__tensor_flatten__``), the object itself stands for its memory.
    """
    place: object
    if tensor.layout != torch.strided:
        return (id(tensor),)
    if not is_wrapper(tensor):
        place = tensor.data_ptr()
    elif is_traceable_wrapper_subclass(tensor):
        inside = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        place = tuple(
            memory_of(item) if isinstance(item, torch.Tensor) else id(item) for item in inside
        )
    else:
        place = id(tensor)
    # The device is a part of it: addresses on two devices may be equal.
    return (
        tensor.device,
        place,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def elements_of(tensor: Tensor) -> tuple[object, ...]:
    """As :func:`memory_of`, but equal for a tensor and its transpose too."""
    memory = memory_of(tensor)
    if tensor.layout != torch.strided:
        return memory
    dimensions = tuple(sorted(zip(tensor.shape, tensor.stride(), strict=True)))
    return (*memory[:3], dimensions, *memory[5:])


def starts_in_one_place(one: Tensor, other: Tensor) -> bool:
    """Whether both begin at the same address, or are wrappers of the same tensors."""
    if is_wrapper(one) or is_wrapper(other):
        return memory_of(one) == memory_of(other)
    return one.data_ptr() == other.data_ptr()
