"""The kinds of averages; names, arguments, arithmetic and checkpoints are those of OpenMMLab."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ema_fused.averages import schedules
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kept_kind import MEAN, MOMENTUM
from ema_fused.averages.momenta import Momentum, MomentumByName, NamedWeights
from ema_fused.averages.momentum import check_function
from ema_fused.averages.options import Options, refuse_momenta
from ema_fused.averages.updating import averages_one_by_one
from ema_fused.engine.checks import check_fraction, check_integer, check_momentum, check_positive
from ema_fused.modules.choosing import Pattern


class StochasticWeightAverage(BaseAveragedModel):
    """The mean of all values seen at the averaging steps (SWA).

    Izmailov et al. 2018, arXiv 1803.05407. ``averaged += (source - averaged) / (n + 1)``, with
    ``n = steps // interval``. Arguments as :class:`BaseAveragedModel`.
    """

    arithmetic = "delta"

    def momentum_at(self, steps: Any) -> Any:
        return 1 / (steps // self.interval + 1)

    def _kind(self) -> str | None:
        return MEAN


class ExponentialMovingAverage(BaseAveragedModel):
    r"""``averaged = (1 - momentum) * averaged + momentum * source``.

    Args:
        momentum: the weight of the model's values, in (0, 1), usually small; or a function of the
            step that gives one in [0, 1] (:mod:`ema_fused.averages.schedules`); or a dict of
            regular expressions and their momenta, numbers in [0, 1] or such functions:
            ``{r"^head\.": 0.01, "": 0.001}``. A tensor has that of the first expression that is
            found in its name, without wrappers' components. Not with ``offload`` or ``capturable``.

    The others as :class:`BaseAveragedModel`.

    Raises:
        TypeError: ``momentum`` is neither a number nor callable, nor a dict of such.
        ValueError: ``momentum`` is outside (0, 1); a name has no expression, or an expression no
            name; tied tensors have two.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: Momentum | Mapping[Pattern, Momentum] = 0.0002,
        *shared: Any,
        **options: Unpack[Options],
    ) -> None:
        # Subclasses with their own schedule take a number only.
        own_schedule = type(self).momentum_at is not ExponentialMovingAverage.momentum_at
        momenta = None
        if isinstance(momentum, Mapping) and not own_schedule:
            cls = type(self)
            refuse_momenta(cls.__name__, options, one_by_one=averages_one_by_one(cls))
            momentum = momentum if isinstance(momentum, dict) else dict(momentum)
            momenta = MomentumByName(momentum)
        elif own_schedule or not callable(momentum):
            momentum = check_momentum(momentum)
        else:
            check_function("momentum", momentum)
        super().__init__(model, *shared, **options)
        self.momentum = momentum
        # Such a number has been warned of already.
        is_number = momenta is None and not callable(momentum)
        self._is_questioned = is_number and bool(momentum > 0.5)  # type: ignore[operator]
        self._momenta = momenta
        if momenta is not None:
            self._is_plain = False
            self._check_momenta(momenta)

    def _check_momenta(self, momenta: MomentumByName) -> None:
        momenta.check(self._averages(), self.update_buffers, self.shared_names, self.left_out_names)

    def momentum_at(self, steps: Any) -> Any:
        momentum = self.momentum
        if callable(momentum):
            return momentum(steps)
        if isinstance(momentum, dict):
            return {name: one(steps) if callable(one) else one for name, one in momentum.items()}
        return momentum

    def _weights_at(self, steps: int) -> float | NamedWeights:
        momentum = self.momentum
        if not isinstance(momentum, dict):
            return super()._weights_at(steps)
        momenta = self._momenta
        if momenta is None or not momenta.is_of(momentum):
            refuse_momenta(
                type(self).__name__,
                {"offload": self.offload, "capturable": self.capturable},
                one_by_one=self._one_by_one,
            )
            momenta = MomentumByName(momentum)
            self._check_momenta(momenta)
            self._momenta = momenta
        return momenta.at(self, steps, self.every)

    def _kind(self) -> str | None:
        momentum = getattr(self.momentum, "func", self.momentum)  # of a functools.partial
        if momentum is schedules.mean:
            return MEAN
        is_known = getattr(momentum, "__module__", None) == schedules.__name__
        return MOMENTUM if is_known or not callable(momentum) else None


class EmaDecaySqrt(ExponentialMovingAverage):
    """A mean up to a step, and from there on values weighted by "1 - sqrt": levanter's.

    Levanter's ``EmaDecaySqrtModelAveraging``, with its arguments: in the place of a learning rate
    that decays, while the model trains and in the memory of one average. (WSM, arXiv 2507.17634,
    does it with checkpoints afterwards, and weighs each by what such a rate falls meanwhile:
    ``python -m ema_fused merge``.) The values of step t count ``1 - beta`` before ``switch_step``,
    and ``1 - sqrt((t - switch_step) / decay_steps)`` from there on; the average is their sum
    divided by all weights so far, and stays as it is from step ``switch_step + decay_steps`` on. So
    ``beta`` says how much the mean before the switch counts after it.

    Steps are counted from the initial copy on, so ``begin_step`` moves the switch too. The average
    of a sharded model is ``AveragedWeights(model, momentum=partial(schedules.ema_decay_sqrt,
    ...))``.

    Args:
        model: the model to average; tensors of any shape and floating-point dtype.
        beta: in [0, 1); 0 counts the steps before the switch like the first after it.
        switch_step: 0 or more; the step of the first weight of the decay, 1.
        decay_steps: 1 or more.

    The others as :class:`BaseAveragedModel`, but ``interval`` has to be 1.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        beta: float = 0.999,
        switch_step: int = 100_000,
        decay_steps: int = 100_000,
        *shared: Any,
        **options: Unpack[Options],
    ) -> None:
        beta = check_fraction("beta", beta)
        if beta == 1:
            raise ValueError(
                "beta is 1, so nothing before switch_step would count; a number in [0, 1) is "
                "expected. To begin at the switch, pass begin_step=..., switch_step=0"
            )
        momentum = functools.partial(
            schedules.ema_decay_sqrt,
            momentum=1.0 - beta,
            switch=check_integer("switch_step", switch_step, least=0),
            total=check_integer("decay_steps", decay_steps, least=1),
        )
        super().__init__(model, momentum, *shared, **options)
        if self.interval > 1:
            raise ValueError(
                f"interval={self.interval} with EmaDecaySqrt: the weights of the steps left out "
                f"would be in its sum, and their values not; leave out calls by every="
            )
        # Its momentum jumps up at the switch, and isn't a decay for that.
        self._is_questioned = True


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
        gamma: float = 100,
        *shared: Any,
        **options: Unpack[Options],
    ) -> None:
        gamma = check_positive("gamma", gamma)
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
        gamma: float = 2000,
        *shared: Any,
        **options: Unpack[Options],
    ) -> None:
        gamma = check_positive("gamma", gamma)
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

    Raises:
        RuntimeError: neither ``max_iters`` nor an own :meth:`total_steps` says how long it is.
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
        end_momentum = check_fraction("end_momentum", end_momentum)
        if max_iters is not None:
            max_iters = check_integer("max_iters", max_iters, least=1)
        super().__init__(model, momentum, *shared, **options)
        if max_iters is None and type(self).total_steps is CosineEMA.total_steps:
            raise self._without_length()  # now, not at the first average
        self.end_momentum = end_momentum
        self.max_iters = max_iters

    def total_steps(self) -> int:
        """The number of steps of the whole training.

        Raises:
            RuntimeError: ``max_iters`` wasn't given.
        """
        if self.max_iters is None:
            raise self._without_length()
        return self.max_iters

    @staticmethod
    def _without_length() -> RuntimeError:
        return RuntimeError(
            "CosineEMA needs the number of steps of the whole training: pass max_iters=..., or "
            "override total_steps()"
        )

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
