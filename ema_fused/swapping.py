"""Averaged weights in the model's place: for the length of a block, or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ema_fused.copying import FrozenShares
from ema_fused.pairing import Pair, pair_up, plan_of
from ema_fused.plan import Plan
from ema_fused.watch import ModuleWatch

# Modules that hold other weights than their own just now.
_swapped: set[nn.Module] = set()


def refuse_while_swapped(action: str, *modules: nn.Module) -> None:
    """Raises RuntimeError if any of ``modules``, or a part of it, is in a ``swapped()`` block."""
    if _swapped and any(part in _swapped for module in modules for part in module.modules()):
        raise RuntimeError(
            f"{action} while averaged weights are swapped in: the model holds the averages now, "
            f"and the average the model's own weights. Do it outside the block; to keep averaged "
            f"weights, save averaged.module.state_dict() there, or averaged.copy_to(another_model)"
        )


# Functions of this file, not closures: a deep copy or a pickle of a swapped model takes its hooks
# along, and there they must find that the copy is not swapped.
def _refuse_saving(module: nn.Module, *_: Any) -> None:
    refuse_while_swapped("state_dict() was called", module)


def _refuse_loading(module: nn.Module, *_: Any) -> None:
    refuse_while_swapped("load_state_dict() was called", module)


def _pairs(averaged: nn.Module, model: nn.Module, shares: FrozenShares) -> list[Pair]:
    """All that the average holds, each source once: one tied more often takes its first average."""
    pairs: dict[int, Pair] = {}
    for pair in pair_up(averaged, model, update_buffers=False, shares=shares).updated:
        pairs.setdefault(id(pair.source), pair)
    return list(pairs.values())


def copy_to(
    averaged: nn.Module, model: nn.Module, *, shares: FrozenShares, backend: str | None
) -> None:
    """Writes every averaged tensor into its place in ``model``, converting dtypes."""
    pairs = _pairs(averaged, model, shares)
    Plan(
        [pair.source for pair in pairs],
        [pair.averaged for pair in pairs],
        backend=backend,
        names=[pair.name for pair in pairs],
    ).copy_()


class _Exchange:
    """Puts averages into a model and takes them out again.

    Tensors of one dtype are swapped in place. Where a model's dtype differs from its average's, a
    swap would lose bits: the model's tensors are kept aside, on the average's device, and
    overwritten.
    """

    def __init__(
        self, averaged: nn.Module, model: nn.Module, shares: FrozenShares, backend: str | None
    ) -> None:
        self._averaged = averaged
        self._model = model
        self._shares = shares
        self._backend = backend
        self._slots_changed = ModuleWatch(averaged, model).changed
        pairs = _pairs(averaged, model, shares)
        self._swaps = [pair for pair in pairs if pair.averaged.dtype == pair.source.dtype]
        self._overwrites = [pair for pair in pairs if pair.averaged.dtype != pair.source.dtype]
        self._swap = plan_of(self._swaps, backend=backend)
        self._overwrite = self._plan_overwriting([pair.averaged for pair in self._overwrites])
        self._kept = [
            pair.source.detach().to(pair.averaged.device, copy=True) for pair in self._overwrites
        ]

    def _plan_overwriting(self, values: list[Any]) -> Plan:
        sources = [pair.source for pair in self._overwrites]
        names = [pair.name for pair in self._overwrites]
        return Plan(sources, values, backend=self._backend, names=names)

    def put_in(self) -> None:
        self._swap.swap_()
        self._overwrite.copy_()

    def take_out(self) -> None:
        try:
            if self._slots_changed():
                self._find_again()
            self._swap.swap_()
            self._plan_overwriting(self._kept).copy_()
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"the model's own weights can't be put back, because the model was changed inside "
                f"the swapped() block: {error}. They are in averaged.module now; leave names, "
                f"dtypes and shapes as they are inside the block"
            ) from error

    def _find_again(self) -> None:
        """The same pairs by name, in modules whose slots hold other tensors by now."""
        found = {pair.name: pair for pair in _pairs(self._averaged, self._model, self._shares)}
        self._swaps = [found[pair.name] for pair in self._swaps]
        self._overwrites = [found[pair.name] for pair in self._overwrites]
        self._swap = plan_of(self._swaps, backend=self._backend)


@contextmanager
def swapped(
    owner: nn.Module,
    averaged: nn.Module,
    model: nn.Module,
    *,
    shares: FrozenShares,
    backend: str | None,
) -> Iterator[nn.Module]:
    """Exchanges the weights of ``averaged`` and ``model`` for the length of the block.

    Args:
        owner: the averaged model around ``averaged``; unusable inside the block, as both others.
    """
    refuse_while_swapped("swapped() was called", owner, model)
    exchange = _Exchange(averaged, model, shares, backend)
    modules = {*owner.modules(), *model.modules()}
    hooks = []
    for module in modules:
        hooks += [
            module.register_state_dict_pre_hook(_refuse_saving),
            module.register_load_state_dict_pre_hook(_refuse_loading),
        ]
    try:
        exchange.put_in()
        _swapped.update(modules)
        try:
            yield model
        finally:
            _swapped.difference_update(modules)
            exchange.take_out()
    finally:
        for hook in hooks:
            hook.remove()
