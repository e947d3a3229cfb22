"""Further values of averaged tensors, under their names in bare modules beside the average."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.modules.choosing import Buffers
from ema_fused.modules.module_pairs import Slot, has_average, is_averaged, slots_of


def averaged_in(
    averages: nn.Module, shared: Collection[str], update_buffers: Buffers = False
) -> dict[str, Slot]:
    """The tensors that have an average of their own, by name; tied ones under each name.

    Args:
        averages: the module with the averages.
        shared: names of its parameters that share the model's memory.
        update_buffers: which buffers are averaged too.
    """
    return {
        name: slot
        for name, slot in slots_of(averages).items()
        if name not in shared
        and not is_lazy(slot.tensor)
        and is_averaged(name, slot, update_buffers)
        and has_average(slot.tensor)
    }


def put(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Registers a parameter under a name with dots, in modules made for it."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        inside = root._modules[part]
        assert inside is not None
        root = inside
    is_parameter = isinstance(tensor, nn.Parameter)
    root._parameters[last] = (
        tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)  # type: ignore[assignment]
    )


def drop(root: nn.Module, name: str) -> None:
    """Takes a parameter that :func:`put` has registered out again."""
    path, _, last = name.rpartition(".")
    del root.get_submodule(path)._parameters[last]
