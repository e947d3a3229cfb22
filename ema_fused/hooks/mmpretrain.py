"""MMPretrain's ``EMAHook``, which evaluates the averaged weights, the model's own, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ema_fused.engine.notices import warn
from ema_fused.hooks import mmengine
from ema_fused.hooks.mmengine import CosineEMA
from ema_fused.hooks.on_mmengine import (
    HOOKS,
    MODELS,
    MMLogger,
    in_the_log,
    replace_hooks,
    replace_models,
)
from ema_fused.hooks.registering import register_beside

__all__ = ["CosineEMA", "EMAHook", "register"]


# In the original's words, and a few more.
_TESTED_AVERAGE = "Start testing on EMA model: with the averaged weights"
_TESTED_ORIGINAL = "Start testing on the original model: with its own weights"


@in_the_log
class EMAHook(mmengine.EMAHook):
    """:class:`ema_fused.hooks.mmengine.EMAHook`, with a choice of what is evaluated.

    If a checkpoint with an average is loaded without resuming (``load_from``), both the model and
    the average get the averaged weights, and the average its steps.

    Args:
        evaluate_on_ema: validate and test with the averaged weights.
        evaluate_on_origin: validate and test with the model's own weights. If both are set, these
            come second, and their metrics go to the message hub as ``val/<metric>_origin``. If
            neither is set, this one is used, with a warning.

    The others as :class:`ema_fused.hooks.mmengine.EMAHook`.
    """

    def __init__(
        self,
        ema_type: str | Callable[..., nn.Module] = "ExponentialMovingAverage",
        strict_load: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        evaluate_on_ema: bool = True,
        evaluate_on_origin: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(ema_type, strict_load, begin_iter, begin_epoch, **kwargs)
        if not (evaluate_on_ema or evaluate_on_origin):
            warn(
                "Automatically set `evaluate_on_origin=True`, since neither it nor "
                "`evaluate_on_ema` is set: the model's own weights are evaluated. To evaluate "
                "nothing, set `val_interval` of the `train_cfg`"
            )
            evaluate_on_origin = True
        self.evaluate_on_ema = evaluate_on_ema
        self.evaluate_on_origin = evaluate_on_origin
        self.load_ema_from_ckpt = False

    def before_train(self, runner: Any) -> None:
        """Checks the start of averaging; copies an average that was loaded into the model."""
        super().before_train(runner)
        if self.load_ema_from_ckpt and not runner._resume:
            _log(
                "Load from a checkpoint with EMA parameters but not resume training: the model "
                "begins with the checkpoint's average"
            )
            self._copy_average_to_model()

    def before_val_epoch(self, runner: Any) -> None:
        """Swaps the averages into the model, if ``evaluate_on_ema``."""
        if self.evaluate_on_ema:
            super().before_val_epoch(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Swaps the averages out again, and evaluates the model's own weights if both are set."""
        super().after_val_epoch(runner, metrics)
        if self.evaluate_on_ema and self.evaluate_on_origin:
            self._evaluate_again(runner, runner.val_loop, "val")

    def before_test_epoch(self, runner: Any) -> None:
        """Logs which weights are tested, and swaps in the averages if ``evaluate_on_ema``."""
        _log(_TESTED_AVERAGE if self.evaluate_on_ema else _TESTED_ORIGINAL)
        if self.evaluate_on_ema:
            super().before_test_epoch(runner)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Swaps the averages out again, and tests the model's own weights if both are set."""
        super().after_test_epoch(runner, metrics)
        if self.evaluate_on_ema and self.evaluate_on_origin:
            _log(_TESTED_ORIGINAL)
            self._evaluate_again(runner, runner.test_loop, "test")

    @staticmethod
    def _evaluate_again(runner: Any, loop: Any, stage: str) -> None:
        runner.model.eval()
        for index, batch in enumerate(loop.dataloader):
            loop.run_iter(index, batch)
        metrics = loop.evaluator.evaluate(len(loop.dataloader.dataset))
        for name, value in metrics.items():
            runner.message_hub.update_scalar(f"{stage}/{name}_origin", value)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Loads an average from the checkpoint, whether the run is resumed or not."""
        if "ema_state_dict" in checkpoint and not runner._resume:
            self._resume_average(checkpoint)
        else:
            super().after_load_checkpoint(runner, checkpoint)
        self.load_ema_from_ckpt = "ema_state_dict" in checkpoint


def _log(message: str) -> None:
    MMLogger.get_current_instance().info(message)


def register(*, replace: bool = False) -> None:
    """Registers the hook as ``FusedMMPretrainEMAHook`` and the average as ``FusedCosineEMA``.

    Args:
        replace: also register as ``EMAHook`` and ``CosineEMA``, replacing the originals: in
            MMPretrain's registries if MMPretrain is installed, else in mmengine's. MMPretrain's
            BYOL and MoCoV3 don't use the registry for their average: set
            ``mmpretrain.models.selfsup.byol.CosineEMA``, or ``.mocov3.CosineEMA``, before they are
            built.
    """
    register_beside(HOOKS, {"MMPretrainEMAHook": EMAHook})
    register_beside(MODELS, {"CosineEMA": CosineEMA})
    if replace:
        replace_hooks("mmpretrain", {"EMAHook": EMAHook})
        replace_models("mmpretrain", {"CosineEMA": CosineEMA})


register()
