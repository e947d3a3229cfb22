"""MMSelfSup 0.x's ``MomentumUpdateHook`` (also ``BYOLHook``), for the runners of mmcv 1.x.

For mmengine's runners use the hook in :mod:`ema_fused.hooks.mmengine`.
"""

from __future__ import annotations

from typing import Any

from ema_fused.hooks.momentum_update import MomentumUpdate, momentum_update
from ema_fused.hooks.on_mmcv import HOOKS, Hook, in_the_log, is_module_wrapper
from ema_fused.hooks.registering import register_beside, register_instead, unwrapped

__all__ = ["BYOLHook", "MomentumUpdateHook", "momentum_update", "register"]


@in_the_log
class MomentumUpdateHook(MomentumUpdate, Hook):  # type: ignore[misc]
    """Averages the target network after each iteration, with a cosine schedule of its momentum.

    The model may be wrapped or not. Arguments and errors as
    :class:`~ema_fused.hooks.momentum_update.MomentumUpdate`.
    """

    def before_train_iter(self, runner: Any) -> None:
        """Sets the model's ``momentum`` for this iteration, if an update is due."""
        if self._is_due(runner.iter):
            model = unwrapped(runner.model, is_module_wrapper)
            self._set_momentum(model, runner.iter, runner.max_iters)

    def after_train_iter(self, runner: Any) -> None:
        """Updates the target network, every ``update_interval`` iterations."""
        if self._is_due(runner.iter):
            self._update(unwrapped(runner.model, is_module_wrapper))


BYOLHook = MomentumUpdateHook
"""A second name of the hook in MMSelfSup."""

_CLASSES = {"MomentumUpdateHook": MomentumUpdateHook, "BYOLHook": BYOLHook}


def register(*, replace: bool = False) -> None:
    """Registers the hook in mmcv's ``HOOKS`` as ``FusedMomentumUpdateHook`` and ``FusedBYOLHook``.

    Args:
        replace: also register as ``MomentumUpdateHook`` and ``BYOLHook``, replacing the originals.
            Call it after MMSelfSup is imported.
    """
    register_beside(HOOKS, _CLASSES)
    if replace:
        register_instead(HOOKS, _CLASSES)


register()
