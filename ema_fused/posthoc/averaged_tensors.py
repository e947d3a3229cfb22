"""The averaged tensors of a model, once for each width, in bare modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_fused.modules.choosing import Buffers
from ema_fused.modules.leaving_out import Selection
from ema_fused.modules.module_pairs import (
    Kind,
    has_average,
    is_averaged,
    refuse_lazy,
    slots_of,
)
from ema_fused.modules.naming import without_wrappers
from ema_fused.modules.sharding import converted
from ema_fused.modules.shared_parameter import shared
from ema_fused.modules.skeleton import skeleton_of


class AveragedTensors(NamedTuple):
    """``modules``: one for each width. ``left_out``: the model's parameters that aren't averaged,
    by their names in the modules, which hold them in the model's memory.
    """

    modules: nn.ModuleList
    left_out: dict[str, Tensor]


def averaged_tensors(
    model: nn.Module, count: int, *, selection: Selection, update_buffers: Buffers
) -> AveragedTensors:
    """New averages of ``model``, with its present values.

    Args:
        count: the number of widths.
        selection: which parameters are averaged.
        update_buffers: which buffers are.

    Raises:
        ValueError: as :meth:`Selection.left_out_of`; or a tensor of the model has no elements yet.
    """
    left_out = selection.left_out_of(model)
    modules = nn.ModuleList(_skeleton(model, left_out, update_buffers) for _ in range(count))
    names = slots_of(modules[0], leave=(Kind.BUFFER, Kind.CACHE)) if left_out else {}
    plain = {name: without_wrappers(name) for name in names}
    return AveragedTensors(
        modules, {name: left_out[own] for name, own in plain.items() if own in left_out}
    )


def _skeleton(model: nn.Module, left_out: Collection[str], update_buffers: Buffers) -> nn.Module:
    def copied(name: str, tensor: Tensor) -> Tensor:
        refuse_lazy(name, tensor, "model")
        if not isinstance(tensor, nn.Parameter):
            return converted(tensor, None, None)
        if without_wrappers(name) in left_out:
            return shared(tensor, trains=True)
        return nn.Parameter(_average_of(tensor), requires_grad=False)

    module = skeleton_of(model, copied, left_out=left_out)
    averages: dict[int, Tensor] = {}  # of buffers; tied ones stay one
    for name, slot in slots_of(module, leave=(Kind.PARAMETER, Kind.CACHE)).items():
        if is_averaged(name, slot, update_buffers) and has_average(slot.tensor):
            averages.setdefault(id(slot.tensor), _average_of(slot.tensor))
            slot.owner._buffers[slot.key] = averages[id(slot.tensor)]
    return module


def _average_of(tensor: Tensor) -> Tensor:
    """A copy; in float32 of 16 bits or fewer, which would lose most updates."""
    is_short = tensor.is_floating_point() and tensor.itemsize <= 2
    return converted(tensor, None, torch.float32 if is_short else None)
