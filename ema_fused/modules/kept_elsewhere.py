"""Weights that a model's own parameters don't hold between its passes.

Those that accelerate keeps in host memory (``cpu_offload``): the parameters are on the meta device
meanwhile, and each pass reads them anew from where they are kept. And those that ZeRO-3 partitions
(:mod:`.partitions`). So that is what is averaged, and what averages are written into. And those
that the caller names (:mod:`.sources`), which are averaged alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ema_fused.engine.memory import memory_of
from ema_fused.modules.naming import plain_names, without_wrappers
from ema_fused.modules.partitions import Partitions, is_partitioned
from ema_fused.modules.sources import Sources


class Kept(Protocol):
    """Where tensors were found."""

    def has_moved(self) -> bool:
        """Whether they are elsewhere now."""


class _KeptIn(NamedTuple):
    """A tensor, and the mapping that had it under ``name``."""

    values: Mapping[str, Tensor]
    name: str
    tensor: Tensor

    def has_moved(self) -> bool:
        return self.values[self.name] is not self.tensor


def have_moved(found: list[Kept]) -> bool:
    """Whether one of the tensors is kept elsewhere now."""
    return any(one.has_moved() for one in found)


class KeptElsewhere:
    """Where the tensors of ``model`` are kept that it doesn't hold itself.

    A tensor that is read from a file at each pass isn't found: written values would be lost.

    Args:
        for_passes: find what the model's passes read, not what the optimizer steps on, where these
            are two.
        sources: what is averaged in place of the model's own tensors.
        left_out: names of parameters that aren't averaged: of them, what passes read is found.

    Attributes:
        found: where :meth:`find` has found something.

    Raises:
        ValueError: ``sources`` don't fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        for_passes: bool = False,
        sources: Sources | None = None,
        left_out: Iterable[str] = (),
    ) -> None:
        self.found: list[Kept] = []
        self._model = model
        self._left_out = plain_names(left_out)
        self._given: dict[int, Tensor] = {}
        if sources is not None and not for_passes:
            given = sources.of(model, left_out=self._left_out)
            self._given = given.by_tensor
            self.found.append(given)
        self._partitions = Partitions(self.found, for_passes=for_passes)
        self._seen: dict[tuple[object, ...], Tensor] = {}

    @functools.cached_property
    def _keepers(self) -> dict[tuple[int, str], tuple[Mapping[str, Tensor], str]]:
        """The mapping and the name in it, by module and key; most models need none of it."""
        keepers: dict[tuple[int, str], tuple[Mapping[str, Tensor], str]] = {}
        for module in self._model.modules():
            for hook in _offloading_hooks(module):
                inside = module.named_modules() if hook.place_submodules else [("", module)]
                for path, part in inside:
                    prefix = f"{path}." if path else ""
                    for key in (*part._parameters, *part._buffers):
                        keepers.setdefault((id(part), key), (hook.weights_map, prefix + key))
        return keepers

    def find(self, owner: nn.Module, key: str, tensor: Tensor, name: str) -> Tensor:
        """The tensor that has the values of ``owner``'s tensor ``key``.

        Args:
            tensor: what the module holds.
            name: in the whole model, for errors.

        Returns:
            A tensor in the memory that the next pass reads, one object for all that are tied; with
            ``requires_grad`` of ``tensor``. ``tensor`` itself if there is no such memory.

        Raises:
            TypeError: ZeRO-3 keeps it where it can't be averaged.
        """
        if id(tensor) in self._given:
            return self._given[id(tensor)]
        if is_partitioned(tensor):
            leaves = without_wrappers(name) in self._left_out
            return self._partitions.find(name, tensor, for_passes=leaves)
        keeper = self._keepers.get((id(owner), key)) if tensor.is_meta else None
        if keeper is None:
            return tensor
        values, there = keeper
        kept = values.get(there)
        # What is on disk is a new tensor at each look.
        if kept is None or kept.is_meta or values[there] is not kept:
            return tensor
        self.found.append(_KeptIn(values, there, kept))
        place = (isinstance(tensor, nn.Parameter), tensor.requires_grad, *memory_of(kept))
        if place not in self._seen:
            self._seen[place] = _as_held(kept, tensor)
        return self._seen[place]


def _as_held(kept: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return kept
    return nn.Parameter(kept.detach(), requires_grad=tensor.requires_grad)


def _offloading_hooks(module: nn.Module) -> Iterator[Any]:
    """Of accelerate's hooks on ``module``, those that take its weights off it between passes."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # several of them are one that has them in a tuple
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            yield one
