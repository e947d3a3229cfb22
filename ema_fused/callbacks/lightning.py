"""Lightning's ``WeightAveraging`` and ``EMAWeightAveraging``: one launch, swapped in place.

For trainers of ``lightning`` and of ``pytorch_lightning``. The base classes come from the package
that is already imported, else from the one that is installed.

Unlike the originals, these callbacks never evaluate, save or end with an "average" from before the
first update; don't test raw weights after ``ckpt_path=``; and don't leave averages in a model that
trains on; and they average models that a strategy shards. The docstrings below say which methods
differ.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from ema_fused.adapters.swa_utils import AveragedModel
from ema_fused.callbacks.lightning_arguments import check_arguments
from ema_fused.callbacks.lightning_originals import originals, shards
from ema_fused.callbacks.lightning_saving import Saving, copied
from ema_fused.callbacks.lightning_sharding import OnShards
from ema_fused.callbacks.lightning_shards import ShardAverage
from ema_fused.engine.checks import as_integer, check_fraction, check_integer
from ema_fused.engine.versions import VersionCounters
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.exchanging import Exchange
from ema_fused.modules.module_pairs import Pairs, pair_up, plan_of

__all__ = ["EMAWeightAveraging", "WeightAveraging"]

_AVERAGED = "module."  # prefix of the averaged tensors in an averaged model's state


_lightning = originals()
_WeightAveraging: Any = _lightning.WeightAveraging
_EMAWeightAveraging: Any = _lightning.EMAWeightAveraging


class WeightAveraging(OnShards, _WeightAveraging):  # type: ignore[misc]
    """Keeps an average of the model, evaluates it and saves it, as Lightning's callback.

    Arguments, hooks, ``should_update`` and checkpoints are the original's; each loads the other's
    checkpoints. The default is the mean of all values (SWA). One update is one launch per device.

    The averages are in the model from ``on_validation_epoch_start`` to ``on_validation_end``, so
    the model's own ``on_validation_epoch_end`` sees them too; likewise in tests and predictions.
    They are swapped in place, and swapped out again if an evaluation raises. When ``fit`` ends they
    stay in the model. Before the first update there is no average: the model's own weights are
    evaluated and saved, and stay when ``fit`` ends.

    A checkpoint holds the averages under ``state_dict`` and the model's own weights under
    ``current_model_state``, also if it is written during a validation or at the end of training. A
    checkpoint saved after ``fit`` has the model's weights at that time under both keys.
    ``trainer.test`` and the like evaluate the ``state_dict`` of a checkpoint. With
    ``save_weights_only`` the averages alone are written, as ``state_dict``.

    A subclass's ``_swap_models`` and ``_copy_average_to_current`` are called when the original
    calls them, provided that there is an average: the one at the beginning and the end of a
    validation epoch, the other at the end of the training. With a ``_swap_models`` of its own,
    tests and predictions swap nothing, as in the original.

    Under ``FSDPStrategy``, ``ModelParallelStrategy`` and ``DeepSpeedStrategy`` (stages 1 to 3) the
    average is made when the strategy has set up the model, and each process averages its own shards
    without communication (an :class:`~ema_fused.AveragedWeights`). Averages of 16-bit weights are
    kept in float32, except FSDP1's. A checkpoint that is a folder has the averages as the model's
    weights, and the own weights in a folder ``current_model_state`` within; DeepSpeed's has the own
    weights, and the averages in ``averaged_model_state``. Its ``weight_averaging.json`` says which
    is which. Checkpoints load on another number of processes where the strategy's do.

    A checkpoint without an average begins one with its weights, and that is said once.

    As in the original, buffers are swapped with ``use_buffers=False`` too.

    Args:
        device: device of the average; None: the model's.
        use_buffers: average floating-point buffers too. If not, they are copied at each update.
        **kwargs: ``avg_fn`` or ``multi_avg_fn``, as in torch's ``AveragedModel``. Those of
            :func:`~ema_fused.adapters.swa_utils.get_ema_multi_avg_fn` and torch's
            ``get_ema_avg_fn`` run in one launch per device; others run as in torch. Of a sharded
            model they get one shard at a time, and must be elementwise: before the training they
            are called on two small tensors, and on parts of these.

    Raises:
        TypeError: an argument is unknown or of a wrong type.
        ValueError: ``avg_fn`` and ``multi_avg_fn`` are both given; or when training begins, one
            that isn't elementwise is to average shards.
    """

    _average_model: Any  # an AveragedModel, or a ShardAverage, or None

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments(device, use_buffers, kwargs)
        if isinstance(device, int):
            device = torch.device("cuda", device)  # the original treats 0 like None
        # Not super(): in EMAWeightAveraging the next class is the original EMAWeightAveraging.
        _WeightAveraging.__init__(self, device, use_buffers, **kwargs)
        self._steps_asked = 0  # optimizer steps that should_update() was asked about
        self._is_final = False  # the averages are in the model for good
        self._is_ending = False  # within on_train_end
        self._swapped_by_subclass = False
        self._model: weakref.ref[nn.Module] | None = None
        self._wrapped: weakref.ref[nn.Module] | None = None  # what the strategy made of it
        self._exchange: Exchange | None = None
        self.own_state: dict[str, Any] | None = None  # while a checkpoint of shards is written

    @property
    def _is_swapped(self) -> bool:
        return self._exchange is not None and self._exchange.is_in

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Makes the averaged copy of the model when ``fit`` begins, if no strategy shards it.

        Counts start anew, so a callback can be used for one run after another.

        Raises:
            ValueError: the trainer has another callback of this kind.
        """
        if stage != "fit":
            return
        if sum(isinstance(callback, _WeightAveraging) for callback in trainer.callbacks) > 1:
            raise ValueError(
                "the trainer has several WeightAveraging callbacks; each would swap and save the "
                "other's weights. Leave one of them"
            )
        self._take_out()
        Saving.wrap(trainer, self)
        self._begin(pl_module, None)
        if shards(trainer.strategy):
            return  # until it is sharded
        made_in = type(pl_module).configure_model.__module__.partition(".")[0]
        if made_in not in ("lightning", "pytorch_lightning"):
            # The layers must exist to be copied. Lightning calls configure_model() again later.
            _lightning.rank_zero_warn(
                "WeightAveraging calls configure_model() to copy the layers that it makes, but "
                "outside the strategy's context; under FSDPStrategy, ModelParallelStrategy and "
                "DeepSpeedStrategy it doesn't"
            )
            pl_module.configure_model()
        average = AveragedModel(
            pl_module,
            device=self._device or pl_module.device,
            use_buffers=self._use_buffers,
            **self._kwargs,
        )
        self._begin(pl_module, average)

    def _begin(self, pl_module: Any, average: Any) -> None:
        self._average_model = average
        self._model = weakref.ref(pl_module)
        self._wrapped = self._exchange = None
        self._is_final = self._swapped_by_subclass = False
        self._steps_asked = self._latest_update_step = 0
        self._latest_update_epoch = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Counts optimizer steps from here on, as a resumed run has already made some."""
        self._steps_asked = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average if ``should_update`` is True for an optimizer step of this batch.

        ``should_update`` is called exactly once for each optimizer step. The original calls it
        again in a batch without a step (``accumulate_grad_batches``), and only for the last step in
        a batch with several (manual optimization). A step that DeepSpeed's engine has skipped, as
        gradients were infinite, takes no update.
        """
        steps = trainer.global_step
        due = [self.should_update(step_idx=step) for step in range(self._steps_asked, steps)]
        self._steps_asked = steps
        if any(due) and not self._was_skipped(trainer):
            self._average_model.update_parameters(self._source(pl_module))
            self._latest_update_step = steps

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Updates the average if ``should_update`` is True for this epoch."""
        super().on_train_epoch_end(trainer, self._source(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Swaps the averages into the model; they stay unless a later callback raises.

        Swapped, not copied: checkpoints written at this point still need the model's own weights.
        """
        if not self._has_averaged():
            _lightning.rank_zero_warn(
                "WeightAveraging has made no update, so the model keeps its own weights; let "
                "should_update() be True within the training (update_starting_at_step and the "
                "like)"
            )
            return
        self._is_ending = True
        try:
            self._copy_average_to_current(pl_module)
        finally:
            self._is_ending = False

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Copies the averages back from the model, so that both hold them."""
        if self._has_averaged() and self._overrides("_copy_average_to_current"):
            self._is_final = True
        if self._is_swapped:
            if isinstance(self._average_model, ShardAverage):
                self._take_out()  # ZeRO-3 steps on other tensors than it swaps; both are written
                self._average_model.copy_to(self._source(pl_module))
            else:
                pairs = _pairs(self._average_model.module, pl_module).updated
                # Pairs of two dtypes weren't swapped: the average holds them still, in its dtype.
                alike = [pair for pair in pairs if pair.averaged.dtype == pair.source.dtype]
                plan_of(alike, backend=None).copy_()
                VersionCounters(pair.held[0] for pair in alike).increment()
            self._exchange = None
            self._is_final = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Swaps out averages that were left in the model by an evaluation that raised."""
        if self._swapped_by_subclass:
            self._swap_by_subclass(pl_module)
        self._take_out()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Swaps the averages into the model."""
        if not self._overrides("_swap_models"):
            self._put_in(pl_module)
        elif self._has_averaged():
            self._swap_by_subclass(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Calls a subclass's ``_swap_models``; otherwise too early.

        The model's hook of this name runs later, as a part of the evaluation.
        """
        if self._swapped_by_subclass:
            self._swap_by_subclass(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Swaps the averages out of the model again."""
        self._take_out()

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Swaps the averages into the model."""
        if not self._overrides("_swap_models"):
            self._put_in(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Swaps the averages out of the model again."""
        self._take_out()

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Swaps the averages into the model."""
        if not self._overrides("_swap_models"):
            self._put_in(pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Swaps the averages out of the model again."""
        self._take_out()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Saves the averages as ``state_dict``, the model's weights as ``current_model_state``."""
        if self._average_model is None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
        elif isinstance(self._average_model, ShardAverage):
            self._save_shards(trainer, checkpoint)
        elif self._is_final or not self._has_averaged():
            # Save the model's present weights; after fit, update_bn() may have changed them.
            checkpoint["current_model_state"] = dict(checkpoint["state_dict"])
            state = self._average_model.state_dict()
            checkpoint["averaging_state"] = {
                name: value for name, value in state.items() if not name.startswith(_AVERAGED)
            }
        elif self._holds_averages():
            self._exchange_now(pl_module)
            own = pl_module.state_dict()
            # Copies, so that both states don't change when the averages are swapped in again.
            checkpoint["state_dict"] = {
                name: own[name].to(value.device, copy=True)
                if isinstance(own.get(name), Tensor)
                else value
                for name, value in checkpoint["state_dict"].items()
            }
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            checkpoint["state_dict"] = copied(checkpoint["state_dict"])
            self._exchange_now(pl_module)
        else:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def averaged_state(self, pl_module: Any, own: dict[str, Any]) -> dict[str, Any]:
        """``own``, a state of the model, with the averages in it; ``own`` itself without any."""
        if self._is_final or not self._has_averaged():
            return own
        is_swapped = self._holds_averages()
        if is_swapped:
            self._exchange_now(pl_module)
        state = self._average_model.state_dict()
        averaged = {name: state.get(_AVERAGED + name, value) for name, value in own.items()}
        if is_swapped:
            averaged = copied(averaged)
            self._exchange_now(pl_module)
        return averaged

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """In ``fit`` loads weights and average; otherwise the model gets the averages only."""
        # Nothing to swap out: all weights are overwritten, here or by the trainer.
        self._is_final = self._swapped_by_subclass = False
        self._exchange = None
        is_fit = trainer.state.fn == "fit"
        if shards(trainer.strategy):
            self._load_shards(trainer, pl_module, checkpoint, is_fit)
        elif is_fit:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if not is_fit:
            self._average_model = None  # it belongs to the weights before loading

    def _has_averaged(self) -> bool:
        """Whether an update was made; before that the average is just a copy of the model."""
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def _put_in(self, pl_module: Any) -> None:
        """Swaps the averages into the model, if ``pl_module`` is the model that they belong to."""
        model = None if self._model is None else self._model()
        if model is None or model is not pl_module or not self._has_averaged():
            return
        if self._is_swapped or self._is_final:
            return
        # Evaluations run in inference mode, and inference tensors can't be updated later.
        with torch.inference_mode(False), torch.no_grad():
            if self._exchange is None:
                self._exchange = self._exchange_with(self._source(model))
            self._exchange.put_in()

    def _exchange_with(self, model: nn.Module) -> Exchange:
        average = self._average_model
        if isinstance(average, ShardAverage):
            return average.exchange_with(model)
        find_pairs = functools.partial(_pairs, average.module, model)
        return Exchange(average.module, model, find_pairs, backend=None)

    def _take_out(self) -> None:
        """Gives the model its own weights back."""
        exchange = self._exchange
        if exchange is not None and exchange.is_in:
            with torch.inference_mode(False), torch.no_grad():
                try:
                    exchange.take_out()
                except RuntimeError:  # the model was converted meanwhile: not tried again
                    self._exchange = None
                    raise

    def _swap_models(self, pl_module: Any) -> None:
        """Swaps in or out; replaces the original's method."""
        if self._is_swapped:
            self._take_out()
        else:
            self._put_in(pl_module)

    def _copy_average_to_current(self, pl_module: Any) -> None:
        """Puts the averages into the model for good; replaces the original's method."""
        if self._is_ending:
            self._put_in(pl_module)  # on_fit_end copies
        else:
            super()._copy_average_to_current(pl_module)

    def _overrides(self, name: str) -> bool:
        """Whether a subclass has its own method ``name``, which may do anything."""
        return getattr(getattr(self, name), "__func__", None) is not vars(WeightAveraging)[name]

    def _swap_by_subclass(self, pl_module: Any) -> None:
        self._swapped_by_subclass = not self._swapped_by_subclass
        self._swap_models(pl_module)

    def _holds_averages(self) -> bool:
        """Whether the model holds the averages, and the average the model's weights."""
        return self._is_swapped or self._swapped_by_subclass

    def _exchange_now(self, pl_module: Any) -> None:
        """Exchanges the two, by the subclass's method if it has one."""
        if self._overrides("_swap_models"):
            self._swap_by_subclass(pl_module)
        else:
            self._swap_models(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled is everything but the references to the model and its swaps."""
        left_behind = {"_model": None, "_wrapped": None, "_exchange": None} | {
            "_swapped_by_subclass": False,
            "own_state": None,
        }
        return self.__dict__ | left_behind


class EMAWeightAveraging(WeightAveraging, _EMAWeightAveraging):  # type: ignore[misc]
    """The exponential average, as by torch's ``get_ema_avg_fn``: the original's bits.

    Args:
        device: as :class:`WeightAveraging`.
        use_buffers: likewise.
        decay: the weight of the average, in [0, 1].
        update_every_n_steps: optimizer steps from one update to the next; 0: only after epochs.
        update_starting_at_step: the first optimizer step, counted from 0, that may update.
        update_starting_at_epoch: the first epoch after which to update too; None: after none.

    Raises:
        TypeError: an argument is unknown or of a wrong type.
        ValueError: an argument is out of its range, or all of them together never update.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise TypeError(
                f"EMAWeightAveraging got {', '.join(kwargs)}; it averages by its decay alone. "
                f"WeightAveraging takes avg_fn and multi_avg_fn"
            )
        check_integer("update_every_n_steps", update_every_n_steps, least=0)
        for name, start in [
            ("update_starting_at_step", update_starting_at_step),
            ("update_starting_at_epoch", update_starting_at_epoch),
        ]:
            if start is not None:
                as_integer(start, name)
        if update_every_n_steps == 0 and update_starting_at_epoch is None:
            raise ValueError(
                "update_every_n_steps is 0 and update_starting_at_epoch is None: nothing would be "
                "averaged; set one of them"
            )
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"decay is {decay!r}; a number in [0, 1] is expected")
        check_fraction("decay", decay)
        # Not the original's __init__, which sets an avg_fn.
        WeightAveraging.__init__(self, device, use_buffers, avg_fn=get_ema_avg_fn(decay))
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch


def _pairs(averaged: nn.Module, model: nn.Module) -> Pairs:
    """The pairs of all parameters and buffers, non-persistent ones included."""
    return pair_up(
        averaged, model, update_buffers=True, shares=FrozenShares(), caches_are_buffers=True
    )
