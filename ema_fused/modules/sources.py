"""Tensors that are averaged in place of a model's own: those that its optimizer keeps.

An optimizer of 16-bit weights steps on float32 copies of them ("master weights") and writes the
rounded values into the model. The copies have the small changes that the weights lack.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.engine.dtensors import local
from ema_fused.engine.memory import memory_of
from ema_fused.modules.naming import common_names, without_wrappers
from ema_fused.modules.partitions import partitioned_parameters

Given: TypeAlias = Mapping[str, Tensor] | Callable[[nn.Module], Mapping[str, Tensor]]


class Sources:
    """The tensors to average, by the names of the plain model.

    Args:
        given: a mapping, or a function that returns one of a model. It is asked at each update
            whether its tensors are still the same objects.
        frozen_too: also of frozen parameters; if not, these are the model's own.

    Raises:
        TypeError: ``given`` is neither.
    """

    def __init__(self, given: Given, *, frozen_too: bool) -> None:
        if not (isinstance(given, Mapping) or callable(given)):
            raise TypeError(
                f"source is a {type(given).__name__}; a mapping from the model's names to tensors "
                f"is expected, or a function that returns one of the model"
            )
        self._given = given
        self._frozen_too = frozen_too

    def __deepcopy__(self, memo: dict[int, Any]) -> Sources:
        return self  # a copy averages the same tensors, not copies of them

    def __reduce__(self) -> Any:
        raise TypeError(
            "an average with source= can't be pickled: it would take the optimizer's tensors with "
            "it; save its state_dict()"
        )

    def of(self, model: nn.Module, *, left_out: Collection[str] = ()) -> SourcesOf:
        """Those of ``model`` at the moment.

        Args:
            left_out: plain names of parameters that aren't averaged, whose values are the model's.

        Raises:
            ValueError: they don't fit the model; or ZeRO-3 has partitioned it.
        """
        if partitioned_parameters(model):
            raise ValueError(
                "source= with ZeRO-3: the float32 pieces that its optimizer steps on are found "
                "without it; leave it out"
            )
        return SourcesOf(self._given, model, left_out, frozen_too=self._frozen_too)


class SourcesOf:
    """The sources of one model; it isn't kept alive.

    Attributes:
        by_tensor: the source by the ``id`` of the tensor that the model holds.
    """

    def __init__(
        self, given: Given, model: nn.Module, left_out: Collection[str], *, frozen_too: bool
    ) -> None:
        self._given = given
        self._model = weakref.ref(model)
        self._taken = dict(self._now(model))
        tensors = {name: one for name, one in self._taken.items() if isinstance(one, Tensor)}
        asked = [(name, one, _asked_for_its_memory(one)) for name, one in tensors.items()]
        self._places = [(name, one, ask, ask(one)) for name, one, ask in asked]
        self.by_tensor: dict[int, Tensor] = {}
        held = dict(_tensors_of(model))
        partners = common_names(self._taken, held)
        own = {id(held[name]) for name in held if without_wrappers(name) in left_out}
        problems = [f"{name!r} isn't in the model" for name in self._taken if name not in partners]
        for name, partner in partners.items():
            tensor = held[partner]
            problem = _misfit(self._taken[name], tensor)
            if problem is not None:
                problems.append(f"{name!r} {problem}")
            elif id(tensor) in own:
                continue
            elif tensor.requires_grad or frozen_too or not isinstance(tensor, nn.Parameter):
                self.by_tensor.setdefault(id(tensor), _as_held(self._taken[name], tensor))
        known = own | {id(held[partner]) for partner in partners.values()}
        problems += [
            f"{without_wrappers(name)!r} is missing"
            for name, tensor in held.items()
            if tensor.requires_grad and id(tensor) not in known
        ]
        if problems:
            raise ValueError(
                f"source= doesn't fit the model: {'; '.join(problems)}. A floating-point tensor of "
                f"the parameter's shape is expected for each that trains and is averaged, under "
                f"its name in the plain model"
            )

    def _now(self, model: nn.Module) -> Mapping[str, Tensor]:
        values = self._given if isinstance(self._given, Mapping) else self._given(model)
        if not isinstance(values, Mapping):
            raise TypeError(
                f"the function passed as source returned a {type(values).__name__}; a mapping from "
                f"the model's names to tensors is expected"
            )
        return values

    def has_moved(self) -> bool:
        """Whether the mapping, or the one that the function returns, has other tensors by now.

        Or they have other memory (``master.data = ...``). Other views of the same memory are the
        same tensors.
        """
        model = self._model()
        if model is None:
            return True
        values = self._now(model)
        if len(values) != len(self._taken):
            return True
        for name, tensor, memory, place in self._places:
            value = values.get(name)
            if value is None or not (value is tensor or _is_like(value, tensor)):
                return True
            if memory(value) != place:
                return True
        return False


def _is_like(value: Any, tensor: Tensor) -> bool:
    """Whether the two are the same tensor if they are in one place."""
    return (
        type(value) is type(tensor)
        and value.layout == tensor.layout
        and value.dtype == tensor.dtype
        and value.device == tensor.device
        and value.shape == tensor.shape
        and (value.layout != torch.strided or value.stride() == tensor.stride())
    )


def _asked_for_its_memory(tensor: Tensor) -> Callable[[Tensor], object]:
    """What tells where the elements of ``tensor`` are; of most, and in most cases, the address."""
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
        return Tensor.data_ptr
    return lambda one: memory_of(local(one))


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each name."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _misfit(source: Any, tensor: Tensor) -> str | None:
    """What is wrong with the source of ``tensor``."""
    if not isinstance(source, Tensor):
        return f"is a {type(source).__name__}"
    if is_lazy(tensor):
        return "has no elements in the model yet"
    if source.shape != tensor.shape:
        return f"has shape {tuple(source.shape)}, and {tuple(tensor.shape)} in the model"
    kinds = [(one.is_floating_point(), one.is_complex()) for one in (source, tensor)]
    if kinds[0] != kinds[1]:
        return f"is {source.dtype}, and {tensor.dtype} in the model"
    return None


def _as_held(source: Tensor, tensor: Tensor) -> Tensor:
    """``source`` as a tensor of the kind that the model holds."""
    if not isinstance(tensor, nn.Parameter):
        return source.detach()
    return nn.Parameter(source.detach(), requires_grad=tensor.requires_grad)
