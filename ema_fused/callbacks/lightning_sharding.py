"""What Lightning's callbacks do under strategies that shard the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ema_fused.callbacks.lightning_checkpoints import (
    OWN,
    load_averages,
    put_averages_in,
    saving,
    writes_folders,
)
from ema_fused.callbacks.lightning_originals import is_deepspeed, originals, shards
from ema_fused.callbacks.lightning_shards import ShardAverage, average_of_shards

__all__ = ["OnShards"]


class OnShards:
    """A part of ``WeightAveraging``: its average is made when the strategy has sharded the model.

    It averages shard by shard, and checkpoints have it as :mod:`.lightning_checkpoints` says.
    """

    own_state: dict[str, Any] | None  # while a checkpoint of shards is written
    _average_model: Any
    _device: Any
    _is_final: bool
    _kwargs: dict[str, Any]
    _model: weakref.ref[nn.Module] | None
    _use_buffers: bool
    _wrapped: weakref.ref[nn.Module] | None  # what the strategy made of the model

    # Methods of the callback.
    _has_averaged: Callable[[], bool]
    _holds_averages: Callable[[], bool]
    _exchange_now: Callable[[Any], None]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the average of a model that the strategy has sharded just now."""
        if shards(trainer.strategy):
            self._average_model = self._average_of_shards(trainer, pl_module)

    def _average_of_shards(self, trainer: Any, pl_module: Any) -> ShardAverage:
        # DeepSpeed's engine has other names; FSDP1's wrapper knows of what has been gathered.
        engine = is_deepspeed(trainer.strategy)
        self._wrapped = weakref.ref(pl_module if engine else trainer.strategy.model)
        return average_of_shards(
            self._source(pl_module),
            device=self._device,
            use_buffers=self._use_buffers,
            **self._kwargs,
        )

    def _source(self, pl_module: Any) -> Any:
        """The model as its strategy has wrapped it."""
        wrapped = None if self._wrapped is None else self._wrapped()
        return pl_module if wrapped is None else wrapped

    def _was_skipped(self, trainer: Any) -> bool:
        """Whether DeepSpeed's engine has left out the last step."""
        engine = trainer.strategy.model
        return is_deepspeed(trainer.strategy) and not engine.was_step_applied()

    def _save_shards(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        if not writes_folders(trainer.strategy):
            own = checkpoint["state_dict"] if self.own_state is None else self.own_state
            checkpoint[OWN] = dict(own)
        count = self._average_model.n_averaged.detach().clone()
        checkpoint["averaging_state"] = {"n_averaged": count}

    def _load_shards(
        self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any], is_fit: bool
    ) -> None:
        strategy = trainer.strategy
        path = Path(strategy.broadcast(trainer.ckpt_path))
        if not is_fit:
            if is_deepspeed(strategy):
                put_averages_in(pl_module, self._average_of_shards(trainer, pl_module), path)
            return
        source = self._source(pl_module)
        if "averaging_state" in checkpoint:
            load_averages(self._average_model, source, strategy, path, checkpoint)
            return
        originals().rank_zero_warn(
            "the checkpoint has no average of WeightAveraging; one begins with the checkpoint's "
            "weights"
        )
        self._average_model.copy_from(source)

    def average_and_model(self) -> tuple[ShardAverage, nn.Module] | None:
        """The average and the model, as its strategy wraps it; None if the model is the average."""
        if self._is_final or not self._has_averaged() or self._wrapped is None:
            return None
        return self._average_model, self._source(None)

    def saving_shards(
        self, trainer: Any, filepath: Any, weights_only: bool
    ) -> AbstractContextManager[None] | None:
        """A block in which a sharded model is saved; None if it isn't sharded."""
        if not isinstance(self._average_model, ShardAverage):
            return None
        return saving(
            self,
            trainer.strategy,
            filepath,
            global_step=trainer.global_step,
            weights_only=weights_only,
        )

    @contextmanager
    def holding(self, *, averages: bool) -> Iterator[None]:
        """A block in which the model holds the averages, or its own weights."""
        model = None if self._model is None else self._model()
        if self._holds_averages() == averages:
            yield
            return
        self._exchange_now(model)
        try:
            yield
        finally:
            self._exchange_now(model)
