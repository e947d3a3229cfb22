"""A wrapper subclass of tensors, as the weights of quantisation libraries are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


class Wrapped(Tensor):
    """Keeps its elements in ``inside``; answers all operations but those named in ``refused``."""

    refused: tuple[str, ...] = ("_foreach_lerp_", "_foreach_add_", "_foreach_copy_")
    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype, device=inside.device
        )
        made.inside = inside
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Wrapped:
        return cls(inner["inside"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in cls.refused:
            raise NotImplementedError(f"{cls.__name__} has no {name}")
        plain = tree_map(_inside, (arguments, options or {}))
        result = function(*plain[0], **plain[1])
        if name.endswith("_"):
            return arguments[0]
        return tree_map(lambda item: cls(item) if isinstance(item, Tensor) else item, result)


class WithoutLerp(Wrapped):
    refused = (*Wrapped.refused, "lerp_")


def _inside(item: object) -> object:
    return item.inside if isinstance(item, Wrapped) else item
