"""The averages that mmengine's configs can name: the package's, and two defined here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from torch import nn

from ema_fused.averages import kinds
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.averages.options import Options
from ema_fused.engine.checks import WrongValueError, check_fraction, check_number
from ema_fused.hooks.on_mmengine import MODELS, MessageHub


class CosineEMA(kinds.CosineEMA):
    """As :class:`ema_fused.CosineEMA`; ``max_iters`` is the runner's if none is given.

    MMPretrain's convention: momentum is the weight of the model's values, 0.004 -> 0.
    """

    def total_steps(self) -> int:
        """The number of iterations of the whole training.

        Raises:
            RuntimeError: ``max_iters`` wasn't given, and no runner is training.
        """
        if self.max_iters is None:
            found = MessageHub.get_current_instance().runtime_info.get("max_iters")
            if found is not None:
                return int(found)
        return super().total_steps()


class InvertedCosineEMA(CosineEMA):
    """The ``CosineEMA`` of MMSelfSup 1.0: its momentum is the weight of the *average*, 0.996 -> 1.

    Args:
        momentum: the weight of the average at step 0, in (0, 1).
        end_momentum: at the last step, in [0, 1].

    The others as :class:`CosineEMA`.

    Raises:
        TypeError, ValueError: ``momentum`` or ``end_momentum`` is no number or out of its range.
    """

    _momentum_is_decay = True

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.996,
        end_momentum: float = 1.0,
        *shared: Any,
        max_iters: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        momentum = check_number("momentum", momentum, "a number in (0, 1)")
        if not 0.0 < momentum < 1.0:
            raise WrongValueError(
                f"momentum is {momentum!r}; a number in (0, 1) is expected: here the weight of the "
                f"average, a decay"
            )
        end_momentum = check_fraction("end_momentum", end_momentum)
        # Placeholders in the other convention, at most 0.5 so as not to warn; replaced below.
        super().__init__(
            model,
            min(1 - momentum, 0.5),
            1 - end_momentum,
            *shared,
            max_iters=max_iters,
            **options,
        )
        self.momentum = momentum
        self.end_momentum = end_momentum

    def momentum_at(self, steps: Any) -> Any:
        """The weight of the model's values after ``steps``, as in the other classes."""
        return 1 - super().momentum_at(steps)


# Our averages, by the class that they replace.
_REPLACED: dict[str, type[BaseAveragedModel]] = {
    "mmengine.model.averaged_model.StochasticWeightAverage": StochasticWeightAverage,
    "mmengine.model.averaged_model.ExponentialMovingAverage": ExponentialMovingAverage,
    "mmengine.model.averaged_model.MomentumAnnealingEMA": MomentumAnnealingEMA,
    "mmdet.models.layers.ema.ExpMomentumEMA": ExpMomentumEMA,
    "mmpretrain.models.utils.ema.CosineEMA": CosineEMA,
    "mmselfsup.models.utils.ema.CosineEMA": InvertedCosineEMA,
}
# By the name in a config, for names that no installed framework has registered.
_BY_NAME: dict[str, type[BaseAveragedModel]] = {
    "StochasticWeightAverage": StochasticWeightAverage,
    "ExponentialMovingAverage": ExponentialMovingAverage,
    "MomentumAnnealingEMA": MomentumAnnealingEMA,
    "ExpMomentumEMA": ExpMomentumEMA,
    "mmdet.ExpMomentumEMA": ExpMomentumEMA,
    "CosineEMA": CosineEMA,
    "mmpretrain.CosineEMA": CosineEMA,
    "mmselfsup.CosineEMA": InvertedCosineEMA,
}


def averaged_class(ema_type: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The class or callable that ``ema_type`` names; our class if it replaces that one.

    Raises:
        KeyError: there is no such average.
    """
    found: Any = ema_type
    if isinstance(ema_type, str):
        with MODELS.switch_scope_and_registry(None) as registry:
            try:
                found = registry.get(ema_type)
            except RuntimeError:  # some releases raise it for an unknown name
                found = None
        if not callable(found):
            found = _BY_NAME.get(ema_type)
        if found is None:
            raise KeyError(
                f"ema_type {ema_type!r} is not registered in mmengine's MODELS; ema_fused has "
                f"{', '.join(_BY_NAME)}. Import the module that registers yours "
                f"(custom_imports in a config), or correct the name"
            )
    # Not every callable has a name: a functools.partial has none.
    name = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    averaged: Callable[..., nn.Module] = _REPLACED.get(name, found)
    return averaged
