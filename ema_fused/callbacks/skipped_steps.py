"""Whether a gradient scaler has skipped the last step of the optimizers of an ``Accelerator``.

``Accelerator.optimizer_step_was_skipped`` knows it of optimizers that the scaler doesn't call then.
Fused ones are called and find the scaler's flag on the device, so there it says that they stepped.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# The flag of the last step, of optimizers that are listened to; the scaler takes it off them.
_flags: weakref.WeakKeyDictionary[Optimizer, Tensor | None] = weakref.WeakKeyDictionary()


def listen(accelerator: Any) -> None:
    """Keeps the flags of fused optimizers from their next step on; a second call does nothing."""
    for prepared in _fused(accelerator):
        if prepared.optimizer not in _flags:
            _flags[prepared.optimizer] = None
            prepared.optimizer.register_step_post_hook(_keep)


def step_was_skipped(accelerator: Any) -> bool:
    """Whether a step of the last call of each optimizer was skipped.

    DeepSpeed's engine knows it. For fused optimizers this reads their flags, which waits for the
    device.
    """
    prepared = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if prepared is not None:
        return not prepared.engine.was_step_applied()
    if accelerator.optimizer_step_was_skipped:
        return True
    for prepared in _fused(accelerator):
        if prepared.optimizer in _flags:
            flag = _flags[prepared.optimizer]
            if flag is not None and bool(flag):
                return True
        # Not listened to yet. A scaler counts the steps since the last one that it skipped.
        elif prepared.scaler.state_dict()["_growth_tracker"] == 0:
            return True
    return False


def _fused(accelerator: Any) -> list[Any]:
    """Accelerate's wrappers of optimizers that are called for skipped steps too."""
    return [
        prepared
        for prepared in accelerator._optimizers
        if prepared.scaler is not None
        and prepared.scaler.is_enabled()
        and isinstance(prepared.optimizer, Optimizer)
        and getattr(prepared.optimizer, "_step_supports_amp_scaling", False)
    ]


def _keep(optimizer: Optimizer, _: Any, __: Any) -> None:
    _flags[optimizer] = getattr(optimizer, "found_inf", None)
