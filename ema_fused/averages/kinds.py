"""The kinds of averages; names, arguments, arithmetic and checkpoints are those of OpenMMLab."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ema_fused.averages import schedules
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.options import Options
from ema_fused.engine.checks import check_fraction, check_integer, check_momentum, check_positive


class StochasticWeightAverage(BaseAveragedModel):
    """The mean of all values seen at the averaging steps (SWA).

    Izmailov et al. 2018, arXiv 1803.05407. ``averaged += (source - averaged) / (n + 1)``, with
    ``n = steps // interval``. Arguments as :class:`BaseAveragedModel`.
    """

    arithmetic = "delta"

    def momentum_at(self, steps: Any) -> Any:
        return 1 / (steps // self.interval + 1)


class ExponentialMovingAverage(BaseAveragedModel):
    """``averaged = (1 - momentum) * averaged + momentum * source``.

    Args:
        momentum: the weight of the model's values, in (0, 1), usually small; or a function of the
            step that gives one in [0, 1] (:mod:`ema_fused.averages.schedules`).

    The others as :class:`BaseAveragedModel`.

    Raises:
        TypeError: ``momentum`` is neither a number nor callable.
        ValueError: ``momentum`` is outside (0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float | Callable[[int], float] = 0.0002,
        *shared: Any,
        **options: Unpack[Options],
    ) -> None:
        # Subclasses with their own schedule take a number only.
        own_schedule = type(self).momentum_at is not ExponentialMovingAverage.momentum_at
        if own_schedule or not callable(momentum):
            check_momentum(momentum)
        super().__init__(model, *shared, **options)
        self.momentum = momentum

    def momentum_at(self, steps: Any) -> Any:
        momentum = self.momentum
        return momentum(steps) if callable(momentum) else momentum


class MomentumAnnealingEMA(ExponentialMovingAverage):
    """An average that changes fast at first: momentum ``max(momentum, gamma / (gamma + steps))``.

    Args:
        momentum: what it falls to, in (0, 1).
        gamma: above 0; at ``steps = gamma`` the momentum is 1/2.

    The others as :class:`BaseAveragedModel`.
    """

    momentum: float

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 100,
        *shared: Any,
        **options: Unpack[Options],
    ) -> None:
        check_positive("gamma", gamma)
        super().__init__(model, momentum, *shared, **options)
        self.gamma = gamma

    def momentum_at(self, steps: Any) -> Any:
        return schedules.annealing(steps, momentum=self.momentum, gamma=self.gamma)


class ExpMomentumEMA(ExponentialMovingAverage):
    """The average of mmdet's YOLOX: ``(1 - momentum) * exp(-(1 + steps) / gamma) + momentum``.

    Rounds as its original does: ``averaged.mul_(1 - m).add_(source, alpha=m)``.

    Args:
        momentum: what it falls to, in (0, 1).
        gamma: time constant of the fall in steps, above 0.

    The others as :class:`BaseAveragedModel`.
    """

    arithmetic = "axpby"
    momentum: float

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 2000,
        *shared: Any,
        **options: Unpack[Options],
    ) -> None:
        check_positive("gamma", gamma)
        super().__init__(model, momentum, *shared, **options)
        self.gamma = gamma

    def momentum_at(self, steps: Any) -> Any:
        return schedules.exponential(steps, momentum=self.momentum, gamma=self.gamma)


class CosineEMA(ExponentialMovingAverage):
    """The average of BYOL and MoCo v3 in MMPretrain: a cosine schedule for the momentum.

    ``end_momentum - (end_momentum - momentum) * (cos(pi * steps / max_iters) + 1) / 2``; after
    ``max_iters`` it stays at ``end_momentum``. Rounds as its original does:
    ``averaged.mul_(1 - m).add_(source, alpha=m)``.

    (In MMSelfSup 1.0 the momentum is the weight of the average: its 0.996 -> 1 is our 0.004 -> 0.)

    Args:
        momentum: at step 0, in (0, 1).
        end_momentum: at step ``max_iters``, in [0, 1].
        max_iters: the number of steps of the whole training; None if a subclass overrides
            :meth:`total_steps`.

    The others as :class:`BaseAveragedModel`.
    """

    arithmetic = "axpby"
    momentum: float

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.004,
        end_momentum: float = 0.0,
        *shared: Any,
        max_iters: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_fraction("end_momentum", end_momentum)
        if max_iters is not None:
            check_integer("max_iters", max_iters, least=1)
        super().__init__(model, momentum, *shared, **options)
        self.end_momentum = end_momentum
        self.max_iters = max_iters

    def total_steps(self) -> int:
        """The number of steps of the whole training.

        Raises:
            RuntimeError: ``max_iters`` wasn't given.
        """
        if self.max_iters is None:
            raise RuntimeError(
                "CosineEMA needs the number of steps of the whole training: pass max_iters=..., or "
                "override total_steps()"
            )
        return self.max_iters

    def momentum_at(self, steps: Any) -> Any:
        total = self.total_steps()
        # The original computes the phase from tensors, so in the default dtype (float32). The same
        # is done here, on the CPU, to get the same bits.
        if isinstance(steps, Tensor):
            now = steps.clamp(max=total).to(torch.get_default_dtype())
            return schedules.half_cosine(
                (math.pi * now / float(total)).double(), self.momentum, self.end_momentum
            )
        now = torch.tensor(min(steps, total), device="cpu")
        phase = (math.pi * now / float(total)).item()
        return schedules.half_cosine(phase, self.momentum, self.end_momentum)
