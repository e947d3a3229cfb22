"""Averages as buffers ``ema_<name>`` of the model itself, as in mmcv 1.x's hooks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ema_fused.engine.plan import Plan
from ema_fused.engine.undisturbed import certainly, undisturbed
from ema_fused.engine.versions import VersionCounters, version_of
from ema_fused.modules.exchanging import tell_of_writes
from ema_fused.modules.watch import ModuleWatch

# The buffers that a hook has registered in a model; a second run removes them.
_registered: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class _Pair(NamedTuple):
    name: str
    averaged: Tensor
    source: Tensor


class RegisteredAverages:
    """Averages of a model's tensors, registered as buffers of the model.

    Tensors that can't be averaged (integers, bool) are copied. Tied tensors have one average,
    registered under each of their names. A tensor added to the model later gets an average that
    starts with its current value. If a tensor's dtype changes, its average's does too.

    Args:
        model: the model, not wrapped.
        skip_buffers: average parameters only, otherwise persistent buffers too.

    Attributes:
        names: for each averaged name of the model, the name of the buffer with its average.

    Raises:
        ValueError: two averages would get the same buffer name, or the model has that name already.
    """

    def __init__(self, model: nn.Module, skip_buffers: bool) -> None:
        self._model = model
        self._skip_buffers = skip_buffers
        ours = _registered.setdefault(model, set())
        for buffer in ours:
            model._buffers.pop(buffer, None)
        ours.clear()
        self.names: dict[str, str] = {}
        self._prepare()

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors to average or copy, by name."""
        model = self._model
        if self._skip_buffers:
            return dict(model.named_parameters())
        tensors: dict[str, Tensor] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            persistent = {
                name: buffer
                for name, buffer in module._buffers.items()
                if name not in module._non_persistent_buffers_set
            }
            for name, tensor in (module._parameters | persistent).items():
                if tensor is not None:
                    tensors[f"{path}.{name}" if path else name] = tensor
        ours = _registered[model]
        return {name: tensor for name, tensor in tensors.items() if name not in ours}

    def _prepare(self) -> None:
        tensors = self._tensors()
        missing = [name for name in self.names if name not in tensors]
        if missing:
            raise KeyError(
                f"the model has lost {', '.join(missing)}, which are averaged; leave the structure "
                f"of the model as it is while it trains"
            )
        self._register([name for name in tensors if name not in self.names], tensors)
        pairs: dict[int, _Pair] = {}
        for name, source in tensors.items():
            averaged = self._model._buffers[self.names[name]]
            assert averaged is not None
            if averaged.dtype != source.dtype:  # a swap would lose bits
                averaged.data = averaged.data.to(source.dtype)
            pairs.setdefault(id(source), _Pair(name, averaged, source))
        self._plan = _plan(list(pairs.values()))
        self._written = VersionCounters(pair.source for pair in pairs.values())
        copied = [pair for pair in pairs.values() if not _has_mean(pair.source)]
        self._copied = _plan(copied)
        self._changed = ModuleWatch(self._model).changed

    def _register(self, names: list[str], tensors: dict[str, Tensor]) -> None:
        """Registers an average for each name; if one can't be registered, none is."""
        taken = {buffer: name for name, buffer in self.names.items()}
        new: dict[str, str] = {}
        for name in names:
            buffer = f"ema_{name.replace('.', '_')}"  # a buffer's name has no dots
            if buffer in taken:
                raise ValueError(
                    f"the averages of {taken[buffer]!r} and {name!r} would both be called "
                    f"{buffer!r}; rename one of the two in the model"
                )
            if hasattr(self._model, buffer):
                raise ValueError(
                    f"the average of {name!r} would be called {buffer!r}, and the model has that "
                    f"already; rename it in the model, or delete it if another run has left it "
                    f"there: del model.{buffer}"
                )
            taken[buffer] = name
            new[name] = buffer
        averages = {
            id(tensors[name]): self._model._buffers[buffer] for name, buffer in self.names.items()
        }
        for name, buffer in new.items():
            source = tensors[name]
            if id(source) not in averages:
                averages[id(source)] = source.detach().clone()
            self._model.register_buffer(buffer, averages[id(source)])
        self.names |= new
        _registered[self._model].update(new.values())

    def versions(self) -> list[int]:
        """The version counters of the averages, by which one sees whether they were loaded."""
        found = [self._model._buffers[buffer] for buffer in self.names.values()]
        return [-1 if average is None else version_of(average) for average in found]

    def copy_(self) -> None:
        """Sets the averages to the model's present values."""
        self._run(lambda: self._plan.copy_())

    def average_(self, momentum: float) -> None:
        """``averaged = (1 - momentum) * averaged + momentum * source``, and copies the integers.

        Raises:
            KeyError: the model has lost a tensor.
            ValueError: a shape differs. Nothing has been updated then.
        """
        self._run(lambda: self._plan.lerp_(momentum))

    def put_in(self) -> None:
        """Swaps model and averages in place; integers in the model don't change.

        If a signal arrives whose handler raises, nothing has been swapped.
        """
        undisturbed(functools.partial(self._run, self._put_in), self._swap)

    def _put_in(self) -> None:
        self._copied.copy_()
        self._swap()

    def take_out(self) -> None:
        """Swaps model and averages back, whatever signals arrive."""
        certainly(functools.partial(self._run, self._swap))

    def _swap(self) -> None:
        self._plan.swap_()
        tell_of_writes(self._written)

    def _run(self, operation: Callable[[], None]) -> None:
        if not self._changed():
            try:
                return operation()
            except ValueError:
                pass  # a dtype or shape has changed: plan again
        self._prepare()
        operation()


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _plan(pairs: list[_Pair]) -> Plan:
    return Plan(
        [pair.averaged for pair in pairs],
        [pair.source for pair in pairs],
        arithmetic="axpby",
        only_copy=[not _has_mean(pair.source) for pair in pairs],
        names=[pair.name for pair in pairs],
    )
