"""mmengine's averaged models and ``EMAHook``, and ``MomentumUpdateHook`` for mmengine's runners."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import (
    ExpMomentumEMA,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.checks import WrongTypeError, WrongValueError, check_not_negative
from ema_fused.engine.notices import warn
from ema_fused.hooks import on_mmengine
from ema_fused.hooks.mmengine_averages import CosineEMA, InvertedCosineEMA, averaged_class
from ema_fused.hooks.momentum_update import MomentumUpdate, momentum_update
from ema_fused.hooks.on_mmengine import (
    HOOKS,
    MODELS,
    Hook,
    MMLogger,
    in_the_log,
    is_model_wrapper,
)
from ema_fused.hooks.registering import register_beside, unwrapped
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.exchanging import Exchange, copy_to, exchange_of_averages

__all__ = [
    "BYOLHook",
    "BaseAveragedModel",
    "CosineEMA",
    "EMAHook",
    "ExpMomentumEMA",
    "ExponentialMovingAverage",
    "InvertedCosineEMA",
    "MomentumAnnealingEMA",
    "MomentumUpdateHook",
    "StochasticWeightAverage",
    "momentum_update",
    "register",
]

_AVERAGED = "module."  # prefix of the averaged tensors in an averaged model's state
_SHOWN = 6


@in_the_log
class EMAHook(on_mmengine.EMAHook):  # type: ignore[misc]
    """Keeps an average of the model, evaluates it, and saves it, as mmengine's ``EMAHook``.

    Its arguments, its checkpoints and when it acts are as in the original. Averages are updated in
    one launch and swapped in place. The averaged models of mmengine, mmdet, MMPretrain and
    MMSelfSup are replaced by ours; any other that derives from mmengine's classes is used
    unchanged, with a warning.

    Args:
        ema_type: name of an averaged model in ``MODELS``, or a callable that makes one, such as its
            class.
        strict_load: whether the keys of a checkpoint must match. If not, a value missing for the
            model or its average is taken from the other, with a warning.
        begin_iter: the iteration, counted from 1, at which averaging starts; 0 is the same as 1,
            and a fraction as the next iteration. Before it the average is a copy of the model.
        begin_epoch: the same in epochs; only one of the two may be given.
        **kwargs: arguments of the averaged model.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        ema_type: str | Callable[..., nn.Module] = "ExponentialMovingAverage",
        strict_load: bool = False,
        begin_iter: float = 0,
        begin_epoch: float = 0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(ema_type, str) and not callable(ema_type):
            raise WrongTypeError(
                f"ema_type is {ema_type!r}; the name of an averaged model in mmengine's MODELS is "
                f"expected, or its class"
            )
        begin_iter = check_not_negative("begin_iter", begin_iter)
        begin_epoch = check_not_negative("begin_epoch", begin_epoch)
        if begin_iter and begin_epoch:
            raise WrongValueError(
                f"begin_iter is {begin_iter} and begin_epoch is {begin_epoch}; only one of them "
                f"may be set"
            )
        super().__init__(ema_type, strict_load, begin_iter, begin_epoch, **kwargs)
        self._exchange: Exchange | None = None

    @property
    def _is_swapped(self) -> bool:
        return self._exchange is not None and self._exchange.is_in

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled is everything but the plans; refused while weights are swapped."""
        if self._is_swapped:
            raise RuntimeError(
                "the hook was copied or pickled during an evaluation, where the model holds the "
                "averages and the average the model's own weights; do it outside of one"
            )
        return self.__dict__ | {"_exchange": None}

    def before_run(self, runner: Any) -> None:
        """Makes the averaged copy of the model.

        Raises:
            KeyError: ``ema_type`` doesn't exist.
            TypeError: it isn't an averaged model.
        """
        self._take_out()
        self.src_model = unwrapped(runner.model, is_model_wrapper)
        kind = averaged_class(self.ema_cfg["type"])
        self.ema_model = MODELS.build(
            {**self.ema_cfg, "type": kind}, default_args={"model": self.src_model}
        )
        if isinstance(self.ema_model, BaseAveragedModel):
            # As the original: the first update copies the model over what was loaded.
            self.ema_model.first_values.forget()
        self._exchange = None
        made = type(self.ema_model).__name__
        if not hasattr(self.ema_model, "update_parameters"):
            raise TypeError(
                f"ema_type is {self.ema_cfg['type']!r}, and what it makes is of the class {made}; "
                f"an averaged model is expected, as ExponentialMovingAverage"
            )
        if not isinstance(self.ema_model, BaseAveragedModel):
            warn(
                f"EMAHook averages by {made}, which is not one of ema_fused's: it runs at its own "
                f"speed. Derive it from ema_fused.hooks.mmengine.BaseAveragedModel",
                SlowPathWarning,
            )

    def before_train(self, runner: Any) -> None:
        """Checks that averaging begins within the run.

        Raises:
            ValueError: it doesn't.
        """
        name, begin, last = (
            ("begin_epoch", self.begin_epoch, runner.max_epochs)
            if self.enabled_by_epoch
            else ("begin_iter", self.begin_iter, runner.max_iters)
        )
        if begin > last:
            raise WrongValueError(
                f"{name} is {begin} and the run ends after {last}: nothing would be averaged; at "
                f"most {last} is expected"
            )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Swaps out averages that were left in the model by an evaluation that raised."""
        self._take_out()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Updates the average with the model, or copies the model before averaging begins."""
        if isinstance(self.ema_model, BaseAveragedModel) and not self._ema_started(runner):
            self.ema_model.copy_from(self.src_model)
        else:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def before_val_epoch(self, runner: Any) -> None:
        """Swaps the averages into the model."""
        self._put_in()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Swaps the averages out of the model again."""
        self._take_out()

    def before_test_epoch(self, runner: Any) -> None:
        """Swaps the averages into the model."""
        self._put_in()

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Swaps the averages out of the model again."""
        self._take_out()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Saves the average as ``state_dict``, the model's own weights as ``ema_state_dict``.

        This works during an evaluation too, when the model holds the averages.

        Raises:
            KeyError: the average has names that the model's state lacks.
        """
        was_swapped = self._is_swapped
        self._take_out()
        ema_state = checkpoint["ema_state_dict"] = self.ema_model.state_dict()
        model_state = checkpoint["state_dict"]
        if was_swapped:
            # Copies, so that both states don't change when the averages are swapped in again.
            own = self.src_model.state_dict()
            for name, tensor in model_state.items():
                model_state[name] = own.get(name, tensor).to(tensor.device, copy=True)
            for name, tensor in ema_state.items():
                ema_state[name] = tensor.clone()
            self._put_in()
        lacking, _ = _differences(model_state, ema_state)
        if lacking:
            raise KeyError(
                f"the model's state lacks what its average has: {_listed(lacking)}; leave the "
                f"structure of the model as it is while it trains"
            )
        for name in _averaged_names(ema_state):
            key = _AVERAGED + name
            model_state[name], ema_state[key] = ema_state[key], model_state[name]

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Resumes the average; if not resuming, or without a saved average, loads ``state_dict``.

        Raises:
            KeyError: names differ, with ``strict_load``.
            RuntimeError: a shape differs; or names differ and the checkpoint has no average.
        """
        logger = MMLogger.get_current_instance()
        if "ema_state_dict" in checkpoint and runner._resume:
            self._resume_average(checkpoint)
            return
        if runner._resume:
            # The first sentence is mmengine's, for whoever looks for it in a log.
            logger.warning(
                "There is no `ema_state_dict` in checkpoint. `EMAHook` will make a copy of "
                "`state_dict` as the initial `ema_state_dict`: the average begins anew, from the "
                "weights that the checkpoint has"
            )
        loaded = checkpoint["state_dict"]
        state = OrderedDict((re.sub(r"^module\.", "", name), t) for name, t in loaded.items())
        # Holds the versions of modules, which they need to convert older checkpoints.
        state._metadata = getattr(loaded, "_metadata", None)  # type: ignore[attr-defined]
        on_mmengine.load_state_dict(self.ema_model.module, state, strict=self.strict_load)

    def _resume_average(self, checkpoint: dict[str, Any]) -> None:
        """Moves the model's own weights back into ``state_dict``, and loads the average."""
        model_state, ema_state = checkpoint["state_dict"], checkpoint["ema_state_dict"]
        lacking, without_average = _differences(model_state, ema_state)
        present = self.src_model.state_dict()
        unknown = [n for n in present if n not in model_state and _AVERAGED + n not in ema_state]
        if lacking or without_average or unknown:
            difference = (
                f"the checkpoint doesn't match: its state_dict lacks {_listed(lacking + unknown)}; "
                f"its ema_state_dict lacks {_listed(without_average + unknown)}"
            )
            if self.strict_load:
                raise KeyError(f"{difference}. Load it with strict_load=False, or load another one")
            MMLogger.get_current_instance().warning(
                f"{difference}. Each takes the other's value; the average takes the model's "
                f"present one where there is none"
            )
        for name in [*_averaged_names(ema_state), *without_average]:
            key = _AVERAGED + name
            average = model_state[name] if name in model_state else ema_state[key]
            model_state[name], ema_state[key] = ema_state.get(key, average), average
        ema_state.update({_AVERAGED + name: present[name] for name in unknown})
        self.ema_model.load_state_dict(ema_state, strict=self.strict_load)

    def _copy_average_to_model(self) -> None:
        if isinstance(self.ema_model, BaseAveragedModel):
            self.ema_model.copy_to(self.src_model)
        else:
            module = self.ema_model.module
            copy_to(module, self.src_model, shares=FrozenShares(), backend=None)

    def _put_in(self) -> None:
        if not self._is_swapped:
            self._swap_ema_parameters()

    def _take_out(self) -> None:
        if self._is_swapped:
            self._swap_ema_parameters()

    def _swap_ema_parameters(self) -> None:
        """Swaps the averaged tensors with the model's, in place."""
        ours = isinstance(self.ema_model, BaseAveragedModel)
        if self._exchange is None:
            self._exchange = (
                self.ema_model.exchange_with(self.src_model, averages_alone=True)
                if ours
                else exchange_of_averages(
                    self.ema_model.module,
                    self.src_model,
                    update_buffers=self.ema_model.update_buffers,
                    shares=FrozenShares(),
                    backend=None,
                )
            )
        if ours:
            self.ema_model.flush()
        if self._is_swapped:
            self._exchange.take_out()
        else:
            self._exchange.put_in()


def _averaged_names(ema_state: dict[str, Any]) -> list[str]:
    """The names in an averaged model's state of the model's tensors, without the prefix."""
    return [name[len(_AVERAGED) :] for name in ema_state if name.startswith(_AVERAGED)]


def _differences(
    model_state: dict[str, Any], ema_state: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """(names only in the average's state, names only in the model's state)."""
    averaged = _averaged_names(ema_state)
    return (
        [name for name in averaged if name not in model_state],
        [name for name in model_state if _AVERAGED + name not in ema_state],
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) or "nothing"


@in_the_log
class MomentumUpdateHook(MomentumUpdate, Hook):  # type: ignore[misc]
    """MMSelfSup 0.x's hook, for algorithms of the BYOL kind under mmengine's runners.

    Arguments and errors as :class:`~ema_fused.hooks.momentum_update.MomentumUpdate`.
    """

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the model's ``momentum`` for this iteration, if an update is due."""
        if self._is_due(runner.iter):
            model = unwrapped(runner.model, is_model_wrapper)
            self._set_momentum(model, runner.iter, runner.max_iters)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Updates the target network, every ``update_interval`` iterations."""
        if self._is_due(runner.iter):
            self._update(unwrapped(runner.model, is_model_wrapper))


BYOLHook = MomentumUpdateHook
"""A second name of the hook in MMSelfSup."""

_HOOKS = {"EMAHook": EMAHook, "MomentumUpdateHook": MomentumUpdateHook, "BYOLHook": BYOLHook}
_MODELS = {
    "StochasticWeightAverage": StochasticWeightAverage,
    "ExponentialMovingAverage": ExponentialMovingAverage,
    "MomentumAnnealingEMA": MomentumAnnealingEMA,
}
_MODELS_OF_OTHERS = {
    "ExpMomentumEMA": ExpMomentumEMA,
    "CosineEMA": CosineEMA,
    "InvertedCosineEMA": InvertedCosineEMA,
}


def register(*, replace: bool = False) -> None:
    """Registers hooks in mmengine's ``HOOKS`` and averages in ``MODELS``, as ``Fused...``.

    Args:
        replace: also register under the originals' names, replacing them, so that a config runs
            unchanged; also the ``CosineEMA`` of MMSelfSup 1.0, if MMSelfSup is imported already.
    """
    register_beside(HOOKS, _HOOKS)
    register_beside(MODELS, _MODELS | _MODELS_OF_OTHERS)
    if replace:
        on_mmengine.replace_hooks("mmengine", _HOOKS)
        on_mmengine.replace_models("mmengine", _MODELS)
        if "mmselfsup" in MODELS.children:
            on_mmengine.replace_models("mmselfsup", {"CosineEMA": InvertedCosineEMA})


register()
