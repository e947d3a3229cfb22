"""Averaged weights in a model for the duration of a block, in which nothing is lost by mistake."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ema_fused.engine.undisturbed import certainly, undisturbed
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.exchanging import Exchange, exchange_of_everything
from ema_fused.modules.first_values import FirstValues
from ema_fused.modules.stepping import before_steps_of
from ema_fused.modules.waiting import wait_until_all_have_read

# The modules whose weights are swapped at the moment.
_swapped: set[nn.Module] = set()


def refuse_while_swapped(action: str, *modules: nn.Module) -> None:
    """Raises RuntimeError if any of ``modules``, or a part of it, is in a ``swapped()`` block."""
    if _swapped and any(part in _swapped for module in modules for part in _parts_of(module)):
        raise RuntimeError(
            f"{action} while averaged weights are swapped in: the model holds the averages now, "
            f"and the average the model's own weights. Do it outside the block; to keep averaged "
            f"weights, save averaged.module.state_dict() outside it, or "
            f"averaged.copy_to(another_model)"
        )


def _parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """``module.modules()``; an average isn't told that it is looked into."""
    return (part for _, part in nn.Module.named_modules(module))


# Module-level functions, not closures: a deep copy or pickle of a swapped model contains these
# hooks, and they must see that the copy itself is not swapped.
def _refuse_saving(module: nn.Module, *_: Any) -> None:
    refuse_while_swapped("state_dict() was called", module)


def _refuse_loading(module: nn.Module, *_: Any) -> None:
    refuse_while_swapped("load_state_dict() was called", module)


def swapped(
    owner: nn.Module,
    averaged: nn.Module,
    model: nn.Module,
    *,
    shares: FrozenShares,
    backend: str | None,
    first_values: FirstValues | None = None,
    on_entry: Callable[[], None] | None = None,
) -> Swapped:
    """Swaps the weights of ``averaged`` and ``model`` for the duration of the block.

    Args:
        owner: the averaged model around ``averaged``. Saving, loading and updating any of the three
            is refused inside the block, and so are steps of the model's optimizers, which would
            train the averages: in other threads too, as a step begins.
        on_entry: is called before anything is swapped.
    """
    find_exchange = functools.partial(
        exchange_of_everything,
        averaged,
        model,
        shares=shares,
        backend=backend,
        first_values=first_values,
    )
    return Swapped(owner, model, find_exchange, on_entry)


class Swapped(ContextDecorator):
    """The context manager of :func:`swapped`.

    A class, because a generator can be interrupted where nothing would put the weights back: after
    its ``yield`` and before the block begins.
    """

    def __init__(
        self,
        owner: nn.Module,
        model: nn.Module,
        find_exchange: Callable[[], Exchange],
        on_entry: Callable[[], None] | None = None,
    ) -> None:
        self._owner = owner
        self._model = model
        self._find_exchange = find_exchange
        self._on_entry = on_entry
        self._block: _Block | None = None

    def __enter__(self) -> nn.Module:
        refuse_while_swapped("swapped() was called", self._owner, self._model)
        wait_until_all_have_read()
        if self._on_entry is not None:
            self._on_entry()
        self._block = _Block(self._model, {*_parts_of(self._owner), *self._model.modules()})
        undisturbed(functools.partial(self._block.enter, self._find_exchange()), self._leave)
        return self._model

    def __exit__(self, *_: object) -> None:
        try:
            certainly(self._leave)
        finally:
            if self._block is not None:
                undisturbed(self._leave)

    def _leave(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.leave()


class _Block:
    """A block in which averages are swapped in; gone with it.

    If nothing leaves it (a signal arrived before the first line of ``__exit__``, or ``__enter__``
    was called by hand), it is left when it is garbage-collected.
    """

    _exchange: Exchange | None = None

    def __init__(self, model: nn.Module, modules: set[nn.Module]) -> None:
        self._model = model
        self._modules = modules
        self._hooks: list[RemovableHandle] = []

    def enter(self, exchange: Exchange) -> None:
        self._exchange = exchange
        try:
            action = "an optimizer's step() was called"
            refuse = functools.partial(refuse_while_swapped, action, self._model)
            self._hooks.append(before_steps_of(self._model, refuse))
            # nn.Module's own functions: modules compiled by TorchScript refuse the public methods.
            before_saving: Any = nn.Module.register_state_dict_pre_hook
            before_loading: Any = nn.Module._register_load_state_dict_pre_hook
            for module in self._modules:
                self._hooks += [
                    before_saving(module, _refuse_saving),
                    before_loading(module, _refuse_loading, with_module=True),
                ]
            exchange.put_in()
            _swapped.update(self._modules)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Does nothing if the block was left before, or not entered."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        _swapped.difference_update(self._modules)
        for hook in self._hooks:
            hook.remove()
        exchange.take_out()

    def __del__(self) -> None:
        undisturbed(self.leave)
