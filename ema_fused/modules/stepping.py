"""Acts before an optimizer writes a model, whichever optimizer it is and in whichever thread."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


def trains(optimizer: Any, model: nn.Module) -> bool:
    """Whether ``optimizer`` has a parameter of ``model``."""
    trained = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    return any(id(parameter) in trained for parameter in model.parameters())


def before_steps_of(model: nn.Module, act: Callable[[], None]) -> RemovableHandle:
    """Calls ``act()`` before each step of any optimizer with a parameter of ``model``.

    Only the optimizers of ``torch.optim`` and those derived from them are noticed, as their
    ``step`` begins. ``model`` isn't kept alive.
    """
    trained = weakref.ref(model)
    # By the number of its parameters: finding out takes longer than an update, so it is repeated
    # only when the number changes.
    known: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        its_model = trained()
        if its_model is None:
            return
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if known.get(optimizer, (-1, False))[0] != count:
            known[optimizer] = count, trains(optimizer, its_model)
        if known[optimizer][1]:
            act()

    return register_optimizer_step_pre_hook(before_step)
