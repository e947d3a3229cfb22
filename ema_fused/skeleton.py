"""The tensors of a model under their names, without the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def skeleton_of(model: nn.Module) -> nn.Module:
    """A tree of bare modules with copies of the parameters and buffers of ``model``.

    Nothing else of the model is copied, so models that can't be deep-copied have one too. Tied
    tensors are tied in it. No parameter needs a gradient, and those of 16 bits or fewer are float32
    here: an average in so few bits would lose most of its updates. Buffers keep their dtype.
    """
    return _Copier().module(model)


class _Copier:
    """Remembers what it has copied; a module or tensor met again is the same copy again."""

    def __init__(self) -> None:
        self._modules: dict[nn.Module, nn.Module] = {}
        self._tensors: dict[Tensor, Tensor] = {}

    def module(self, original: nn.Module) -> nn.Module:
        known = self._modules.get(original)
        if known is not None:
            return known
        bare = self._modules[original] = nn.Module()
        for name, parameter in original._parameters.items():
            bare.register_parameter(name, None if parameter is None else self._average(parameter))
        for name, buffer in original._buffers.items():
            is_kept = name not in original._non_persistent_buffers_set
            copied = None if buffer is None else self._copy(buffer)
            bare.register_buffer(name, copied, persistent=is_kept)
        for name, child in original._modules.items():
            bare.add_module(name, None if child is None else self.module(child))
        return bare

    def _average(self, parameter: nn.Parameter) -> nn.Parameter:
        average = self._tensors.get(parameter)
        if average is None:
            is_short = parameter.is_floating_point() and parameter.itemsize <= 2
            dtype = torch.float32 if is_short else parameter.dtype
            copied = parameter.detach().to(dtype=dtype, copy=True)
            average = self._tensors[parameter] = nn.Parameter(copied, requires_grad=False)
        assert isinstance(average, nn.Parameter)
        return average

    def _copy(self, buffer: Tensor) -> Tensor:
        if buffer not in self._tensors:
            self._tensors[buffer] = buffer.detach().clone()
        return self._tensors[buffer]
