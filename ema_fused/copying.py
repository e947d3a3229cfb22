"""The copy of a model that holds its average, and the parameters it needn't copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def averaged_copy(
    model: nn.Module,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    *,
    share_frozen: bool,
) -> tuple[nn.Module, set[str]]:
    """A deep copy of ``model`` that needs no gradient, on ``device`` and with floats in ``dtype``.

    Parameters are converted one by one while they are copied, so that the device of ``model`` never
    holds a second copy in the old place or dtype.

    Args:
        device: of the copy; None keeps each tensor where it is.
        dtype: of floating-point parameters and buffers; None keeps theirs.
        share_frozen: parameters of ``model`` that need no gradient are not copied: the copy has
            parameters of its own over the same memory.

    Returns:
        The copy, and the names of the parameters that share memory with ``model``.
    """

    def converted(tensor: Tensor) -> Tensor:
        if id(tensor) in shared:
            return tensor
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    memo: dict[int, object] = {}
    shared: set[int] = set()
    for parameter in model.parameters():
        # Under the memo, deepcopy takes these for the copies that it would make itself.
        if share_frozen and not parameter.requires_grad:
            alias = nn.Parameter(parameter.data, requires_grad=False)
            memo[id(parameter)] = alias
            shared.add(id(alias))
        elif type(parameter) is nn.Parameter:
            data = parameter.data
            moved = converted(data)
            if moved is not data:
                memo[id(parameter)] = nn.Parameter(moved, requires_grad=False)
    # Not module.to(): it would give shared parameters memory of their own.
    module = copy.deepcopy(model, memo).requires_grad_(False)
    module._apply(converted)
    names = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if id(parameter) in shared
    }
    return module, names


class FrozenShares:
    """Keeps track of the averaged parameters that are views of frozen source parameters.

    Args:
        names: of those parameters in the averaged module.
        device: where a parameter goes that gets its own memory; None: where its source is.
        dtype: of such a parameter; None: its source's.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.names = set(names)
        self._device = device
        self._dtype = dtype

    def settle(self, name: str, averaged: Tensor, source: Tensor) -> bool:
        """Makes ``averaged`` a view of ``source`` again where one of them has been moved.

        A source that has become trainable ends the sharing: its average gets memory of its own,
        with the source's present value.

        Returns:
            Whether the two share memory.
        """
        if name not in self.names:
            return False
        if source.requires_grad:
            averaged.data = source.data.to(device=self._device, dtype=self._dtype, copy=True)
            self.names.discard(name)
            return False
        if not is_view_of(averaged, source):
            averaged.data = source.data
        return True


def is_view_of(averaged: Tensor, source: Tensor) -> bool:
    """Whether both are the same elements in the same memory."""
    return (
        averaged.data_ptr() == source.data_ptr()
        and averaged.device == source.device
        and averaged.dtype == source.dtype
        and averaged.shape == source.shape
        and averaged.stride() == source.stride()
    )
