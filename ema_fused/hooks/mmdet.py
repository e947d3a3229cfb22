"""mmdet 3.x's ``MeanTeacherHook``, and its ``ExpMomentumEMA`` average."""

from __future__ import annotations

from typing import Any

from torch import nn

from ema_fused.averages.kinds import ExpMomentumEMA
from ema_fused.engine.checks import WrongModelError, check_integer, check_momentum
from ema_fused.hooks.on_mmengine import (
    HOOKS,
    MODELS,
    Hook,
    in_the_log,
    is_model_wrapper,
    replace_hooks,
    replace_models,
)
from ema_fused.hooks.registering import register_beside, unwrapped
from ema_fused.modules.module_pairs import Kind
from ema_fused.modules.pairing import Pairing

__all__ = ["ExpMomentumEMA", "MeanTeacherHook", "register"]


@in_the_log
class MeanTeacherHook(Hook):  # type: ignore[misc]
    """Keeps ``model.teacher`` as an average of ``model.student`` (arXiv 1703.01780).

    ``teacher = (1 - momentum) * teacher + momentum * student`` after each ``interval`` iterations,
    in one launch per update. When training begins (iteration 0) the teacher is set to the student.

    Args:
        momentum: the weight of the student, in (0, 1).
        interval: iterations from one update to the next.
        skip_buffer: leave the teacher's buffers alone. Otherwise floating-point buffers are
            averaged and integer buffers copied; non-persistent buffers are always left alone.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self, momentum: float = 0.001, interval: int = 1, skip_buffer: bool = True
    ) -> None:
        self.momentum = check_momentum(momentum)
        self.interval = check_integer("interval", interval, least=1)
        self.skip_buffers = skip_buffer
        self._pairing: Pairing | None = None

    def before_train(self, runner: Any) -> None:
        """Checks that both networks exist and match, and sets the teacher to the student.

        Raises:
            AttributeError: the model has no teacher or no student.
            KeyError, ValueError, TypeError: the two differ in structure; the names are listed.
        """
        model = unwrapped(runner.model, is_model_wrapper)
        self._paired(model)
        if runner.iter == 0:
            self.momentum_update(model, 1)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Updates the teacher with the student, every ``interval`` iterations."""
        if (runner.iter + 1) % self.interval == 0:
            self.momentum_update(unwrapped(runner.model, is_model_wrapper), self.momentum)

    def momentum_update(self, model: nn.Module, momentum: float) -> None:
        """Updates the teacher of ``model`` with the student, by weight ``momentum``; 1 copies it.

        Raises:
            AttributeError: the model has no teacher or no student.
            KeyError, ValueError, TypeError: the two differ in structure.
        """
        pairing = self._paired(model)
        if momentum == 1:
            pairing.copy_()
        else:
            pairing.average_(momentum)

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled is everything but the pairing, which refers to the networks."""
        return self.__dict__ | {"_pairing": None}

    def _paired(self, model: nn.Module) -> Pairing:
        teacher, student = (getattr(model, name, None) for name in ("teacher", "student"))
        if not isinstance(teacher, nn.Module) or not isinstance(student, nn.Module):
            found = ", ".join(name for name, _ in model.named_children())
            raise WrongModelError(
                f"{type(model).__name__} has the networks {found or '(none)'}; MeanTeacherHook "
                f"expects two of one structure that are called teacher and student"
            )
        known, update_buffers = self._pairing, not self.skip_buffers
        if known is None or not known.holds(teacher, student, update_buffers):
            self._pairing = known = Pairing(
                teacher,
                student,
                update_buffers=update_buffers,
                arithmetic="axpby",
                leave=(Kind.CACHE,) if update_buffers else (Kind.BUFFER, Kind.CACHE),
            )
        return known


def register(*, replace: bool = False) -> None:
    """Registers the hook in mmengine's ``HOOKS`` and the average in ``MODELS``, as ``Fused...``.

    Args:
        replace: also register as ``MeanTeacherHook`` and ``ExpMomentumEMA``, replacing the
            originals: in mmdet's registries if mmdet is installed, else in mmengine's.
    """
    hooks, models = {"MeanTeacherHook": MeanTeacherHook}, {"ExpMomentumEMA": ExpMomentumEMA}
    register_beside(HOOKS, hooks)
    register_beside(MODELS, models)
    if replace:
        replace_hooks("mmdet", hooks)
        replace_models("mmdet", models)


register()
