"""The averaging hooks of mmcv 1.x: mmcv's own ``EMAHook``, and those of mmdet 2.x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ema_fused.averages import schedules
from ema_fused.engine.checks import (
    WrongTypeError,
    check_fraction,
    check_integer,
    check_momentum,
    check_not_negative,
    check_positive,
)
from ema_fused.engine.notices import warn
from ema_fused.hooks.on_mmcv import HOOKS, Hook, in_the_log, is_module_wrapper
from ema_fused.hooks.registered_averages import RegisteredAverages
from ema_fused.hooks.registering import register_beside, register_instead, unwrapped

__all__ = [
    "BaseEMAHook",
    "EMAHook",
    "ExpMomentumEMAHook",
    "LinearMomentumEMAHook",
    "register",
]


@in_the_log
class BaseEMAHook(Hook):  # type: ignore[misc]
    """Keeps averages as buffers ``ema_<name>`` of the model, with ``.`` as ``_`` in the name.

    ``averaged = (1 - momentum) * averaged + momentum * source`` after each ``interval`` iterations.
    From the end of a training epoch to the beginning of the next, so in evaluations and
    checkpoints, the model holds the averages and the buffers hold the model's own weights. So the
    run ends with the averages in the model.

    Args:
        momentum: the weight of the model's values, in (0, 1).
        interval: iterations from one update to the next.
        skip_buffers: average parameters only. Otherwise persistent floating-point buffers are
            averaged too, and integer buffers copied.
        resume_from: path of a checkpoint to resume from, after the averages are registered. If it
            has none, they begin with its weights, and the log says so.
        momentum_fun: the momentum as a function of the iteration; None keeps ``momentum``.

    Attributes:
        param_ema_buffer: for each averaged name, the name of its buffer.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        momentum: float = 0.0002,
        interval: int = 1,
        skip_buffers: bool = False,
        resume_from: str | None = None,
        momentum_fun: Callable[[int], float] | None = None,
    ) -> None:
        if momentum_fun and not callable(momentum_fun):
            raise WrongTypeError(
                f"momentum_fun is {momentum_fun!r}; None or a function of the iteration is expected"
            )
        self.momentum = check_momentum(momentum)
        self.interval = check_integer("interval", interval, least=1)
        self.skip_buffers = skip_buffers
        self.checkpoint = resume_from
        self.momentum_fun = momentum_fun

    def before_run(self, runner: Any) -> None:
        """Registers the averages in the model; resumes if ``resume_from`` was given.

        Raises:
            ValueError: two averages would get the same buffer name, or the model has that name
                already.
        """
        model = unwrapped(runner.model, is_module_wrapper)
        self._averages = RegisteredAverages(model, self.skip_buffers)
        self.param_ema_buffer = self._averages.names
        if self.checkpoint is not None:
            self._resume(runner, self.checkpoint)

    def _resume(self, runner: Any, checkpoint: str) -> None:
        """Resumes; averages that the checkpoint doesn't have begin with the weights that it has."""
        before = self._averages.versions()
        runner.resume(checkpoint)
        if self._averages.versions() == before:
            self._averages.copy_()
            warn(
                f"{checkpoint} has no averages (ema_*), so they begin here, with the weights that "
                f"it has"
            )

    def get_momentum(self, runner: Any) -> float:
        """The weight of the model's values at ``runner.iter``."""
        return self.momentum_fun(runner.iter) if self.momentum_fun else self.momentum

    def _is_due(self, iteration: int) -> bool:
        return (iteration + 1) % self.interval == 0

    def after_train_iter(self, runner: Any) -> None:
        """Updates the averages with the model.

        Raises:
            ValueError: ``momentum_fun`` gives a momentum outside [0, 1].
        """
        if self._is_due(runner.iter):
            self._averages.average_(check_fraction("momentum", self.get_momentum(runner)))

    def after_train_epoch(self, runner: Any) -> None:
        """Swaps the averages into the model, to be evaluated and saved."""
        self._averages.put_in()

    def before_train_epoch(self, runner: Any) -> None:
        """Swaps the averages out of the model again."""
        self._averages.take_out()


class ExpMomentumEMAHook(BaseEMAHook):
    """Momentum falls from near 1: ``(1 - momentum) * exp(-(1 + iter) / total_iter) + momentum``.

    Args:
        total_iter: the time constant of the decay in iterations, above 0.
        **kwargs: as :class:`BaseEMAHook`; ``momentum_fun`` is ignored.
    """

    def __init__(self, total_iter: float = 2000, **kwargs: Any) -> None:
        total_iter = check_positive("total_iter", total_iter)
        super().__init__(**kwargs)
        self.momentum_fun = lambda step: schedules.exponential(
            step, momentum=self.momentum, gamma=total_iter
        )


class LinearMomentumEMAHook(BaseEMAHook):
    """Momentum grows: ``min(momentum ** interval, (1 + iter) / (warm_up + iter))``.

    With the defaults the first of the two is smaller from the start, so the momentum is constant.
    As in the original, the momentum is raised to the power of ``interval``, as if it were a decay.

    Args:
        warm_up: iterations, 0 or more; with 1 or less there is no warm-up.
        **kwargs: as :class:`BaseEMAHook`; ``momentum_fun`` is ignored.
    """

    def __init__(self, warm_up: float = 100, **kwargs: Any) -> None:
        warm_up = check_not_negative("warm_up", warm_up)
        super().__init__(**kwargs)
        self.momentum_fun = lambda step: schedules.linear_warmup(
            step, momentum=self.momentum**self.interval, warm_up=warm_up
        )


class EMAHook(BaseEMAHook):
    """mmcv's own hook: averages parameters only, after iterations 0, ``interval``, 2 ``interval``,
    ...

    Args:
        momentum: the weight of the model's values, in (0, 1). The attribute ``momentum`` is the
            final value, ``momentum ** interval``.
        interval: iterations from one update to the next.
        warm_up: as in :class:`LinearMomentumEMAHook`.
        resume_from: as in :class:`BaseEMAHook`.
    """

    def __init__(
        self,
        momentum: float = 0.0002,
        interval: int = 1,
        warm_up: float = 100,
        resume_from: str | None = None,
    ) -> None:
        warm_up = check_not_negative("warm_up", warm_up)
        super().__init__(momentum, interval, skip_buffers=True, resume_from=resume_from)
        self.warm_up = warm_up
        self.momentum **= self.interval
        self.momentum_fun = lambda step: schedules.linear_warmup(
            step, momentum=self.momentum, warm_up=self.warm_up
        )

    def _is_due(self, iteration: int) -> bool:
        return iteration % self.interval == 0


_CLASSES = {
    "EMAHook": EMAHook,
    "ExpMomentumEMAHook": ExpMomentumEMAHook,
    "LinearMomentumEMAHook": LinearMomentumEMAHook,
}


def register(*, replace: bool = False) -> None:
    """Registers the hooks in mmcv's ``HOOKS`` as ``FusedEMAHook`` and so on.

    Args:
        replace: also register under the originals' names, replacing them. Call it after mmdet is
            imported.
    """
    register_beside(HOOKS, _CLASSES)
    if replace:
        register_instead(HOOKS, _CLASSES)


register()
