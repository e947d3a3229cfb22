"""TRL's callbacks that keep averages, with our updates: the same names, arguments and numbers.

    trainer = DPOTrainer(model, args=DPOConfig(sync_ref_model=True, ...), ...)
    use_fused_callbacks(trainer)  # those that TRL's trainers add by themselves
    trainer = SFTTrainer(model, callbacks=[BEMACallback(update_freq=100)], ...)  # one of your own

They are callbacks of transformers' ``Trainer`` and work with it alone too; TRL isn't imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.ops import update_
from ema_fused.engine.versions import VersionCounters
from ema_fused.frameworks import missing
from ema_fused.modules.exchanging import tell_of_writes
from ema_fused.modules.model_argument import check_model

try:
    from transformers import TrainerCallback

    from ema_fused.callbacks.trl_bema import BEMACallback
except ImportError as error:
    raise missing("transformers", "transformers", error) from error

__all__ = [
    "BEMACallback",
    "PEFTAdapterEMACallback",
    "SyncRefModelCallback",
    "SyncTeacherModelCallback",
    "use_fused_callbacks",
]


class SyncRefModelCallback(TrainerCallback):  # type: ignore[misc]
    """TRL's ``SyncRefModelCallback``: all of the reference model is averaged in one launch.

    ``ref_model = (1 - alpha) * ref_model + alpha * model``, at every ``args.ref_model_sync_steps``
    steps, with ``args.ref_model_mixup_alpha``, over the parameters of both in their order; bitwise
    the original's. Dtypes and devices may differ. Parameters that ZeRO-3 has partitioned are
    gathered for it, as by the original.

    Args:
        ref_model: the reference model, wrapped or not; None does nothing.
        accelerator: unwraps the model; None takes it as it is.
    """

    def __init__(self, ref_model: nn.Module | None, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.ref_model = ref_model

    @staticmethod
    @outside_graphs
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """Moves the parameters of ``target_model`` towards those of ``model`` by ``alpha``.

        Raises:
            ValueError: they have not equally many parameters, or shapes differ. Unlike the
                original's, no parameter is changed then.
        """
        check_model("sync_target_model()", model)
        check_model("sync_target_model()", target_model)
        averaged, source = list(target_model.parameters()), list(model.parameters())
        if len(averaged) != len(source):
            raise ValueError(
                f"the reference model has {len(averaged)} parameters and the model {len(source)}; "
                f"two models of one structure are expected (of a model with PEFT's adapters, the "
                f"reference is the model without them)"
            )
        with _whole([*averaged, *source]) as is_written_here:
            if is_written_here:
                update_(averaged, source, alpha, arithmetic="axpby")
                tell_of_writes(VersionCounters(averaged))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Averages, if it is time."""
        self._sync(args.ref_model_sync_steps, lambda: args.ref_model_mixup_alpha, state, kwargs)

    def _sync(
        self, every: int, alpha: Callable[[], float], state: Any, kwargs: dict[str, Any]
    ) -> None:
        if self.ref_model is None or state.global_step % every:
            return
        model = kwargs["model"]
        if self.accelerator:
            model = self.accelerator.unwrap_model(model)
        self.sync_target_model(model, self.ref_model, alpha())


@contextmanager
def _whole(parameters: list[nn.Parameter]) -> Iterator[bool]:
    """Gathers what ZeRO-3 has partitioned; yields whether this process is to write it."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield True
        return
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield deepspeed.comm.get_rank() == 0


class SyncTeacherModelCallback(SyncRefModelCallback):
    """TRL's ``SyncTeacherModelCallback`` of SDPO and SDFT, with our update.

    Args:
        teacher_model: the teacher, wrapped or not.
        accelerator: unwraps the model; None takes it as it is.
    """

    def __init__(self, teacher_model: nn.Module | None, accelerator: Any = None) -> None:
        super().__init__(ref_model=teacher_model, accelerator=accelerator)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Averages, if it is time."""
        self._sync(args.teacher_sync_steps, lambda: args.teacher_update_rate, state, kwargs)


class PEFTAdapterEMACallback(TrainerCallback):  # type: ignore[misc]
    """TRL's ``PEFTAdapterEMACallback``: an adapter that is the average of the one that trains.

    It starts at zero, and ``teacher = (1 - update_rate) * teacher + update_rate * student`` at
    every ``sync_steps`` steps; bitwise the original's. The teacher's tensors are the averages
    themselves (:func:`ema_fused.adapters.peft.add_averaged_adapter`), in the student's dtype: no
    copies of them, and one launch an update. Which parameters need a gradient isn't touched. The
    teacher of a checkpoint that the Trainer resumes from goes on.

    Args:
        model: the ``PeftModel`` that is trained, wrapped or not.
        teacher_adapter_name: of the new adapter.
        update_rate: the weight of the student, in [0, 1].
        sync_steps: steps from one update to the next.
        accelerator: unwraps the model; None takes it as it is.

    Attributes:
        average: of the adapter; None before the training.
        teacher_adapter_config: the configuration of the student's adapter; None before.
    """

    def __init__(
        self,
        model: Any,
        teacher_adapter_name: str = "teacher",
        update_rate: float = 0.05,
        sync_steps: int = 1,
        accelerator: Any = None,
    ) -> None:
        self.model = model
        self.teacher_adapter_name = teacher_adapter_name
        self.update_rate = update_rate
        self.sync_steps = sync_steps
        self.accelerator = accelerator
        self.average: AveragedWeights | None = None
        self.teacher_adapter_config: Any = None

    @property
    def shadow_weights(self) -> dict[str, Tensor] | None:
        """The averages by the names that PEFT writes; not copies. None before the training."""
        if self.average is None:
            return None
        from peft import get_peft_model_state_dict

        found: dict[str, Tensor] = get_peft_model_state_dict(
            self._unwrapped(), adapter_name=self.teacher_adapter_name
        )
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the teacher, or goes on with that of the checkpoint.

        Raises:
            ValueError: the model has an adapter of this name, and no training is resumed.
            TypeError: the model isn't a ``PeftModel``.
        """
        self._take_accelerator(kwargs)
        self._begin(is_resumed=state.global_step > 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates the teacher, if it is time."""
        if state.global_step % self.sync_steps:
            return
        self._take_accelerator(kwargs)
        average = self._begin(is_resumed=False)
        average.update_parameters(self._unwrapped())

    def _begin(self, *, is_resumed: bool) -> AveragedWeights:
        if self.average is not None:
            return self.average
        from ema_fused.adapters.peft import add_averaged_adapter

        model, name = self._unwrapped(), self.teacher_adapter_name
        adapters = getattr(model, "peft_config", {})
        known: dict[str, Tensor] = {}
        if name in adapters and is_resumed:
            from peft import get_peft_model_state_dict

            known = get_peft_model_state_dict(model, adapter_name=name)
            model.delete_adapter(name)
        elif name in adapters:
            raise ValueError(f"Adapter with name '{name}' already exists.")  # in PEFT's words
        average = AveragedWeights(
            model, self._momentum, share_frozen=True, arithmetic="products", version_counters=True
        )
        for own, parameter in average.avg_parameters.items():
            if own not in average.shared_names:
                parameter.data.zero_()
        average.steps.fill_(1)  # type: ignore[operator]  # no copy at the first update
        self.teacher_adapter_config = adapters.get(getattr(model, "active_adapter", None))
        add_averaged_adapter(average, model, name)
        self.average = average
        if known:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, known, adapter_name=name)
        return average

    def _momentum(self, _: int) -> float:
        return self.update_rate

    def _unwrapped(self) -> Any:
        if self.accelerator is None:
            return self.model
        return self.accelerator.unwrap_model(self.model)

    def _take_accelerator(self, kwargs: dict[str, Any]) -> None:
        if self.accelerator is None:
            self.accelerator = kwargs.get("accelerator")


def use_fused_callbacks(trainer: Any) -> list[str]:
    """Replaces TRL's callbacks of a trainer by ours, in their places.

    Call it before ``trainer.train()``; TRL's trainers add theirs when they are made
    (``sync_ref_model``, ``teacher_model_kind="ema"``).

    Args:
        trainer: one of TRL's, or transformers' ``Trainer``.

    Returns:
        A sentence for each callback that was replaced.

    Raises:
        TypeError: ``trainer`` is no ``Trainer``.
        RuntimeError: one of the callbacks has averages already.
    """
    handler = getattr(trainer, "callback_handler", None)
    if handler is None:
        raise TypeError(
            f"use_fused_callbacks() was given a {type(trainer).__name__}; a transformers.Trainer "
            f"is expected, TRL's or another"
        )
    done = []
    for number, callback in enumerate(handler.callbacks):
        cls = type(callback)
        ours = _OURS.get(cls.__qualname__) if cls.__module__.split(".")[0] == "trl" else None
        if ours is None:
            continue
        kind, names, averages = ours
        if averages is not None and getattr(callback, averages) is not None:
            raise RuntimeError(
                f"the {cls.__qualname__} of the trainer has averages already; call "
                f"use_fused_callbacks() before trainer.train()"
            )
        arguments = {to: getattr(callback, of) for of, to in names.items() if hasattr(callback, of)}
        handler.callbacks[number] = kind(**arguments)
        done.append(f"{cls.__module__}.{cls.__qualname__} is ema_fused.callbacks.trl's now")
    return done


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# By the original's name: ours, which of its attributes is which argument, and which has averages.
_OURS: dict[str, tuple[Callable[..., Any], dict[str, str], str | None]] = {
    "SyncRefModelCallback": (SyncRefModelCallback, _same("ref_model", "accelerator"), None),
    "SyncTeacherModelCallback": (
        SyncTeacherModelCallback,
        {"ref_model": "teacher_model", "accelerator": "accelerator"},
        None,
    ),
    "PEFTAdapterEMACallback": (
        PEFTAdapterEMACallback,
        _same("model", "teacher_adapter_name", "update_rate", "sync_steps", "accelerator"),
        "shadow_weights",
    ),
    "BEMACallback": (
        BEMACallback,
        _same(
            "update_freq",
            "ema_power",
            "bias_power",
            "lag",
            "update_after",
            "multiplier",
            "min_ema_multiplier",
            "device",
            "update_ref_model",
            "ref_model_update_freq",
            "ref_model_update_after",
        ),
        "running_model",
    ),
}
