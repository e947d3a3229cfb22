"""Makes the copy of a model that holds its average; frozen parameters can be shared instead."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from ema_fused.engine.dtensors import local, replace_local
from ema_fused.engine.memory import memory_of
from ema_fused.modules.deep_copies import deep_copy
from ema_fused.modules.naming import without_wrappers
from ema_fused.modules.sharding import (
    Device,
    converted,
    drop_gathered,
    refuse_deepcopy,
    refuse_partitioned,
)
from ema_fused.modules.shared_parameter import (
    copy_of_own_class,
    has_own_class,
    protect,
    release,
    shared,
)
from ema_fused.modules.skeleton import skeleton_of, without_frameworks
from ema_fused.modules.sources import Sources


def averaged_copy(
    model: nn.Module,
    device: Device,
    dtype: torch.dtype | None,
    *,
    share_frozen: bool,
    pinned: bool = False,
    left_out: Collection[str] = (),
) -> tuple[nn.Module, set[str]]:
    """A deep copy of ``model`` without gradients, on ``device``, floating-point tensors in
    ``dtype``.

    Parameters are converted one by one while they are copied, so that a whole second copy never
    exists on the old device or in the old dtype.

    Args:
        device: of the copy; None keeps each tensor where it is.
        dtype: of floating-point parameters and buffers; None keeps theirs.
        share_frozen: parameters of ``model`` that need no gradient are not copied: those of the
            copy are in the same memory (:func:`~ema_fused.modules.shared_parameter.shared`).
        pinned: in host memory, pinned if CUDA is available.
        left_out: plain names of parameters that aren't averaged. They share memory too, unless
            ``device`` or ``dtype`` is another than theirs: the copy is to be called with them.

    Returns:
        The copy, and the names of the parameters that share memory with ``model``.

    Raises:
        TypeError: ``model`` is sharded by FSDP, or its parameters are partitioned by ZeRO-3, or
            are of a class that can't be copied.
        Exception: of the class that ``copy.deepcopy`` raises, if an attribute of a module can't be
            copied; the message names it.
    """
    refuse_deepcopy(model)
    model = without_frameworks(model)

    def moved_to(tensor: Tensor) -> Tensor:
        if id(tensor) in aliases or is_lazy(tensor):
            return tensor
        wanted = dtype if tensor.is_floating_point() else None
        if pinned and tensor.is_cuda:
            return converted(tensor, device, wanted, pinned=True)
        return tensor.to(device=device, dtype=wanted)

    memo: dict[int, object] = {}
    aliases: set[int] = set()
    for name, parameter in model.named_parameters():
        refuse_partitioned(name, parameter)
        # deepcopy takes what it finds in the memo as the copy, and doesn't copy it again.
        if is_lazy(parameter):
            memo[id(parameter)] = _without_elements(parameter)
        elif without_wrappers(name) in left_out and _stays(parameter, device, dtype):
            alias = shared(parameter, trains=True)
            memo[id(parameter)] = alias
            aliases.add(id(alias))
        elif share_frozen and not parameter.requires_grad:
            alias = shared(parameter)
            memo[id(parameter)] = alias
            aliases.add(id(alias))
        elif type(parameter) is nn.Parameter:
            data = parameter.data
            moved = moved_to(data)
            if moved is not data:
                memo[id(parameter)] = nn.Parameter(moved, requires_grad=False)
        elif has_own_class(parameter):
            memo[id(parameter)] = copy_of_own_class(name, parameter, memo)
    for buffer in model.buffers():
        if is_lazy(buffer):
            memo[id(buffer)] = _without_elements(buffer)
    module = deep_copy(model, memo)
    # Not module.requires_grad_(), which modules compiled by TorchScript and lazy parameters refuse.
    for parameter in module.parameters():
        parameter.requires_grad = False
    # Not module.to(), which would give shared parameters new memory.
    module._apply(moved_to)
    return module, _names_of(aliases, module)


def averaged_skeleton(
    model: nn.Module,
    device: Device,
    dtype: torch.dtype | None,
    *,
    share_frozen: bool,
    pinned: bool = False,
    left_out: Collection[str] = (),
    sources: Sources | None = None,
) -> tuple[nn.Module, set[str]]:
    """The averaged tensors of ``model`` in bare modules; otherwise as :func:`averaged_copy`.

    What is left out always shares memory: nothing is called with it.

    Args:
        sources: what is averaged in place of the model's own tensors.

    Raises:
        ValueError: ``sources`` don't fit the model.
        TypeError: ZeRO-3 keeps a parameter where it can't be averaged.
    """
    drop_gathered(model)
    aliases: set[int] = set()

    def average_of(name: str, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            return _without_elements(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        leaves = is_parameter and without_wrappers(name) in left_out
        if leaves or (share_frozen and is_parameter and not tensor.requires_grad):
            alias = shared(tensor, trains=leaves)
            aliases.add(id(alias))
            return alias
        wanted = dtype if tensor.is_floating_point() else None
        average = converted(tensor, device, wanted, pinned=pinned)
        return nn.Parameter(average, requires_grad=False) if is_parameter else average

    module = skeleton_of(model, average_of, sources=sources, left_out=left_out)
    return module, _names_of(aliases, module)


def _stays(parameter: Tensor, device: Device, dtype: torch.dtype | None) -> bool:
    """Whether an average on ``device`` and in ``dtype`` would be where the parameter is."""
    if dtype not in (None, parameter.dtype) and parameter.is_floating_point():
        return False
    return device is None or torch.empty(0, device=device).device == parameter.device


def _without_elements(tensor: Tensor) -> Tensor:
    """The average of a lazy layer's tensor, whose shape the first forward pass tells."""
    options: dict[str, Any] = {"device": tensor.data.device, "dtype": tensor.data.dtype}
    if isinstance(tensor, UninitializedParameter):
        lazy: Tensor = UninitializedParameter(requires_grad=False, **options)
        return lazy
    buffer: Tensor = UninitializedBuffer(requires_grad=False, **options)
    return buffer


def _names_of(identities: set[int], module: nn.Module) -> set[str]:
    # Not named_parameters(): wrappers override it to remove their component from the names.
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        for name, parameter in part._parameters.items()
        if id(parameter) in identities
    }


class FrozenShares:
    """Keeps track of the averaged parameters that are views of source parameters: of frozen ones,
    and of those that are left out of the average, whether they train or not.

    Args:
        names: names of these parameters in the averaged module.
        device: of a parameter that stops sharing; None: its source's.
        dtype: of such a parameter; None: its source's.
        pinned: in host memory, pinned if CUDA is available.
        left_out: the model's parameters that aren't averaged, by their names in the averaged
            module. Those that aren't in ``names`` are copies.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        pinned: bool = False,
        left_out: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.take(names, left_out or {})
        self._device = device
        self._dtype = dtype
        self._pinned = pinned

    def take(self, names: Iterable[str], left_out: Mapping[str, Tensor]) -> None:
        """Takes over the names of another averaged module; arguments as the constructor's."""
        self.names = set(names)
        self.left_out = list(left_out)
        self._left_out = frozenset(left_out)
        self._sources = {name: weakref.ref(source) for name, source in left_out.items()}

    def leave_out(self, name: str) -> bool:
        """Whether the parameter isn't averaged, but shared with the model or copied from it."""
        return name in self._left_out

    def share(self, name: str, source: Tensor) -> bool:
        """Whether the average of ``source`` is to be in its memory."""
        return name in self.names and (name in self._left_out or not source.requires_grad)

    def is_of_another(self, name: str, averaged: Tensor, source: Tensor, of_model: Tensor) -> bool:
        """Whether ``averaged`` is left out and shared, and with another model than ``source``'s.

        Args:
            of_model: the parameter whose values are in ``source``, mostly itself.
        """
        if name not in self.names or name not in self._left_out:
            return False
        known = self._sources.get(name)
        is_known = known is not None and known() is of_model
        return not is_known and not is_view_of(local(averaged), local(source))

    def settle(self, name: str, averaged: Tensor, source: Tensor, of_model: Tensor) -> bool:
        """Makes ``averaged`` a view of ``source`` again if either has been moved or written.

        If the source has become trainable, the sharing ends: the average gets its own memory with
        the source's current value. (Not of one that is left out.)

        Args:
            of_model: the parameter whose values are in ``source``, mostly itself.

        Returns:
            Whether the two share memory.
        """
        if name not in self.names:
            return False
        if not self.share(name, source):
            self.end(name, averaged, source)
            return False
        if not is_view_of(local(averaged), local(source)):
            replace_local(averaged, local(source).data)
        protect(averaged)
        if name in self._left_out:
            self._sources[name] = weakref.ref(of_model)
        return True

    def end(self, name: str, averaged: Tensor, source: Tensor) -> None:
        """Gives ``averaged`` its own memory, with the current value of ``source``."""
        if averaged is source and has_own_class(source):
            raise ValueError(
                f"{name!r} is shared with the model as the very {type(source).__name__} "
                f"(share_frozen) and has become trainable, or a state is loaded into it; a "
                f"parameter of the average's own is expected. Build a new average of the model"
            )
        own = converted(local(source), self._device, self._dtype, pinned=self._pinned)
        replace_local(averaged, own)
        release(averaged)
        self.names.discard(name)

    def average_of(self, name: str, source: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A new average of ``source`` with its current value: a view of it if shared, else a copy.

        Args:
            dtype: of the copy; None: that of a parameter that stops sharing.
        """
        if dtype is None and source.is_floating_point():
            dtype = self._dtype
        if self.share(name, source):
            # That of a frozen parameter gets a version counter of its own.
            return source.detach() if name in self._left_out else source.data
        self.names.discard(name)
        return converted(source, self._device, dtype, pinned=self._pinned)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know no model."""
        return self.__dict__ | {"_sources": {}}


def is_view_of(averaged: Tensor, source: Tensor) -> bool:
    """Whether both are the same elements in the same memory."""
    return averaged is source or memory_of(averaged) == memory_of(source)
