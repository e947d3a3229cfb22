"""Checkpoints of which Lightning asks no callback: of weights alone, and folders of shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class HasAverage(Protocol):
    """A callback with an average of the trainer's model."""

    def averaged_state(self, pl_module: Any, own: dict[str, Any]) -> dict[str, Any]:
        """``own``, a state of the model, with the averages in it."""

    def saving_shards(
        self, trainer: Any, filepath: Any, weights_only: bool
    ) -> AbstractContextManager[None] | None:
        """A block in which a sharded model is saved; None if it isn't sharded."""


class Saving:
    """``trainer.save_checkpoint``, which writes the averages of a callback.

    With ``weights_only`` and of sharded models; of others the callback's own hook sees to it.

    The state is exchanged where the trainer takes it from: before the model's own
    ``on_save_checkpoint``, which sees the averages in checkpoints with everything too.

    Args:
        by: the callback; nothing is changed while it is none of the trainer's.
        trainer: Lightning's trainer.
        save: its ``save_checkpoint`` so far.
    """

    def __init__(self, by: HasAverage, trainer: Any, save: Callable[..., None]) -> None:
        self._by = by
        self._trainer = trainer
        self._save = save

    @classmethod
    def wrap(cls, trainer: Any, by: HasAverage) -> None:
        """Wraps the method of ``trainer``, once for ``by``."""
        present = trainer.save_checkpoint
        if not isinstance(present, cls) or present._by is not by:
            trainer.save_checkpoint = cls(by, trainer, present)

    def __call__(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        trainer, strategy = self._trainer, self._trainer.strategy
        if self._by not in trainer.callbacks:
            self._save(filepath, weights_only, storage_options)
            return
        shards = self._by.saving_shards(trainer, filepath, bool(weights_only))
        if shards is not None:
            with shards:
                self._save(filepath, weights_only, storage_options)
            return
        if not weights_only:
            self._save(filepath, weights_only, storage_options)
            return
        own = strategy.lightning_module_state_dict()
        averaged = self._by.averaged_state(trainer.lightning_module, own)
        strategy.lightning_module_state_dict = lambda: averaged
        try:
            self._save(filepath, weights_only, storage_options)
        finally:
            del strategy.lightning_module_state_dict


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with copies of its tensors."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }
