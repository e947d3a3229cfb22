"""An average of the model that Hugging Face's ``Trainer`` trains.

    trainer = Trainer(model, args, ...)
    callback = EMACallback(momentum=0.001).attach(trainer)
    trainer.train()

A ``Trainer`` notifies its callbacks when an evaluation ends, but not when one begins, nor which
checkpoint it resumes from. So the callback needs the trainer: ``attach`` passes it, and adds the
callback unless it was passed in ``Trainer(callbacks=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.callbacks.shards import (
    as_the_first_sees,
    check_can_be_saved,
    is_spread,
    read_shards,
    write_shards,
)
from ema_fused.callbacks.wrapped_methods import call_inside
from ema_fused.frameworks import missing
from ema_fused.posthoc.power_function import PowerFunctionEMA
from ema_fused.saving import resuming, whole_files
from ema_fused.saving.first_process import by_the_first

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    from ema_fused.callbacks.huggingface_files import Average, adapters_in, describe, read, write
    from ema_fused.callbacks.huggingface_shards import write_whole
    from ema_fused.callbacks.skipped_steps import listen, step_was_skipped
except ImportError as error:
    raise missing("transformers", "transformers", error) from error

__all__ = ["AVERAGED", "EMACallback"]

AVERAGED = "averaged"
"""The folder inside each checkpoint."""

_SHARDS = "shards"  # the folder in there of what each process writes

# Attributes that are set on a Trainer that shards the model in a way that isn't averaged, and how.
_REFUSED = {
    "is_fsdp_xla_enabled": "FSDP of XLA",
    "is_distributed_loading_by_transformers": "a model sharded at load time",
}


class EMACallback(TrainerCallback):  # type: ignore[misc]
    """Keeps an average of the model, evaluates it, and saves it beside the model.

    * The average is updated after each step of the optimizer: once if gradients are accumulated
      over several batches, and not at all if a gradient scaler skipped the step. Each ``train()``
      starts a new average.
    * ``evaluate()`` and ``predict()``, inside ``train()`` and afterwards, run with the averaged
      weights. The log, ``metric_for_best_model`` and ``EarlyStoppingCallback`` see their metrics.
      Afterwards the model has its own weights again, even if the evaluation raises. In your own
      evaluation use ``with callback.swapped():``.
    * ``save_model()``, and so each checkpoint, writes the model's own weights to the usual place,
      and the average into the folder ``averaged`` beside them:
      ``from_pretrained("checkpoint-500/averaged")`` is the averaged model. With PEFT's adapters in
      the model the folder has the averaged adapters alone:
      ``PeftModel.from_pretrained(base, "checkpoint-500/averaged")``. Resume such a run with the
      callback: without it the Trainer takes the folder for a second adapter.
    * ``train(resume_from_checkpoint=...)`` resumes the average from that folder, bit for bit.
    * Under FSDP, FSDP2 and DeepSpeed the average is an :class:`~ema_fused.AveragedWeights`: each
      process averages its shards, and an update sends nothing. Where the weights themselves are
      sharded the folder has each process's part in ``shards``, which any number of processes loads.
      The files for ``from_pretrained`` are gathered tensor by tensor, where the Trainer gathers the
      model for its own (``FULL_STATE_DICT``, ``stage3_gather_16bit_weights_on_model_save``); at any
      time by :meth:`save_pretrained`. All processes have to call ``save_model()`` then.
    * With ``load_best_model_at_end`` both the model and its average are those of the best
      checkpoint when ``train()`` returns. ``trainer.model`` then still has its own weights;
      ``callback.average.copy_to(trainer.model)`` writes the averages into it.
    * ``trainer.remove_callback(callback)`` ends all of this.

    Args:
        average: the kind of average: a class of ema_fused, :class:`~ema_fused.PowerFunctionEMA`
            among them, or a function that takes the model and returns an average; None:
            :class:`~ema_fused.ExponentialMovingAverage`, or :class:`~ema_fused.AveragedWeights`
            under FSDP and DeepSpeed and with ``source=``. Sharded models are averaged by the latter
            alone, which copies no module.
        evaluated_sigma_rel: which of the averages of a ``PowerFunctionEMA`` is evaluated, and
            written for ``from_pretrained``; may be omitted if it keeps only one. The state beside
            it holds all. Snapshots to make others from are yours to write:
            ``callback.average.save_snapshot(folder)``.
        **arguments: its arguments: ``momentum=0.001``, ``update_buffers=True``,
            ``averaged_dtype=torch.float32``, ... With batch norm in the model, ``update_buffers``
            averages its statistics too; otherwise the average uses the model's latest statistics.

    Attributes:
        average: the averages; None before ``train()``.
        evaluated_sigma_rel: as given.

    Raises:
        TypeError, ValueError, RuntimeError: ``average`` can't be called, or has no such arguments.
    """

    def __init__(
        self,
        average: Callable[..., Average] | None = None,
        *,
        evaluated_sigma_rel: float | None = None,
        **arguments: Any,
    ) -> None:
        if average is not None and not callable(average):
            raise TypeError(
                f"average is {average!r}; a class of averaged models is expected, or a function "
                f"that takes a model and returns an averaged model (momentum goes by name: "
                f"EMACallback(momentum=0.001))"
            )
        self.evaluated_sigma_rel = evaluated_sigma_rel
        if average is None and "source" in arguments:
            average = AveragedWeights  # a copy of the module takes no source
        # Raises for wrong arguments now instead of when training starts.
        kind = ExponentialMovingAverage if average is None else average
        if isinstance(kind, type) and issubclass(kind, BaseAveragedModel):
            now: dict[str, Any] = {**arguments, "device": None}
            if "source" in arguments:
                now["source"] = {}  # the one given fits the real model alone
            self._check(kind(nn.Identity(), **now))
        elif isinstance(kind, type) and issubclass(kind, PowerFunctionEMA):
            self._check(kind(nn.Identity(), **arguments))
        self.average: Average | None = None
        self._kind = average
        self._arguments = arguments
        self._trainer: Any = None
        self._resumed_from: str | None = None
        self._adapters_before: set[str] = set()

    def attach(self, trainer: Any) -> Self:
        """Connects the callback to the evaluations, checkpoints and resuming of ``trainer``.

        The trainer's methods ``train``, ``evaluation_loop`` and ``save_model`` are wrapped;
        overrides in a subclass are still called.

        Args:
            trainer: a ``transformers.Trainer``; the callback is added to it unless it was passed
                before.

        Returns:
            The callback itself.

        Raises:
            TypeError: ``trainer`` isn't a ``transformers.Trainer``.
            RuntimeError: the callback is attached already, or the trainer has another EMACallback.
            NotImplementedError: the trainer shards the model in a way that isn't averaged.
        """
        lacking = [
            name
            for name in ("train", "evaluation_loop", "save_model", "callback_handler")
            if not hasattr(trainer, name)
        ]
        if lacking:
            raise TypeError(
                f"attach() was given a {type(trainer).__name__} without {', '.join(lacking)}; a "
                f"transformers.Trainer is expected"
            )
        if self._trainer is not None:
            raise RuntimeError("this EMACallback is attached to a trainer already; make another")
        others = [c for c in trainer.callback_handler.callbacks if isinstance(c, EMACallback)]
        if any(other is not self for other in others):
            raise RuntimeError(
                "the trainer has another EMACallback, and evaluations can run with one average "
                "only; remove_callback() that one first"
            )
        for attribute, strategy in _REFUSED.items():
            if getattr(trainer, attribute, False):
                raise NotImplementedError(
                    f"EMACallback can't average under {strategy}, where each process has a part "
                    f"of the model only; shard the model by fsdp=True of TrainingArguments "
                    f"(FSDP2), or by deepspeed"
                )
        if not others:
            trainer.add_callback(self)
        self._trainer = trainer
        call_inside(trainer, "train", self._training)
        call_inside(trainer, "evaluation_loop", self._evaluation)
        call_inside(trainer, "save_model", self._saving)
        return self

    def swapped(self) -> AbstractContextManager[nn.Module]:
        """``with callback.swapped():`` runs the trainer's model with the averaged weights.

        As :meth:`BaseAveragedModel.swapped`.

        Raises:
            RuntimeError: there is no average yet.
        """
        if self.average is None:
            raise RuntimeError("there is no average before trainer.train() of the attached trainer")
        if isinstance(self.average, PowerFunctionEMA):
            model = self._trainer.model
            return self.average.swapped(model, sigma_rel=self.evaluated_sigma_rel)
        return self.average.swapped(self._trainer.model)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the averages alone, as a folder for ``from_pretrained``; all processes call it.

        Shards are gathered tensor by tensor, and the first process writes them.

        Args:
            folder: replaced, if it is there.

        Raises:
            RuntimeError: there is no average yet.
        """
        if self.average is None:
            raise RuntimeError("there is no average before trainer.train() of the attached trainer")
        if not (self._is_spread() or self._trainer.args.should_save):
            return
        at = Path(folder)
        with self._first() as is_first:
            if is_first:
                whole_files.begin_beside(at)
        self._write(whole_files.beside(at), whole=True)
        with self._first() as is_first:
            if is_first:
                whole_files.put_in_place(at)

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Makes the average, and loads it if training is resumed.

        Raises:
            RuntimeError: the callback isn't attached, the average doesn't match the model, or the
                model has an adapter of the folder's name.
            TypeError: ``average`` returned something else, or deep-copies a model that is sharded.
            ValueError: it returned averages of several widths, without the one to evaluate; or
                those of FSDP1's parameters have another dtype, and couldn't be saved.
        """
        if self._trainer is None:
            raise RuntimeError(
                "EMACallback was passed to a Trainer and not attached to it, so evaluations would "
                "run without the averages: call callback.attach(trainer) before trainer.train()"
            )
        model = self._model()
        if AVERAGED in self._adapters_before:
            raise RuntimeError(
                f"the model has an adapter called {AVERAGED!r}, and the Trainer saves it into the "
                f"folder of the average; give the adapter another name"
            )
        if AVERAGED in adapters_in(model):
            # The Trainer has found the average in the checkpoint, and takes it for an adapter.
            model.delete_adapter(AVERAGED)  # type: ignore[operator]
        average = self._made()
        self._check(average)
        check_can_be_saved(average, self._trainer.model)
        self.average = average
        if self._resumed_from is not None:
            self._load(self._resumed_from)
        listen(self._trainer.accelerator)

    def _made(self) -> Average:
        """An average of the trainer's model, which is sharded already."""
        trainer, kind = self._trainer, self._kind
        if kind is None:
            shards = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            kind = AveragedWeights if shards else ExponentialMovingAverage
        # Of FSDP1, the wrapper has to be seen; otherwise a copy needs the model's save_pretrained.
        model = trainer.model if trainer.is_fsdp_enabled else self._model()
        return kind(model, **self._arguments)

    def _check(self, average: object) -> None:
        """Raises unless it is an average, of which one can be told to be evaluated."""
        wanted = self.evaluated_sigma_rel
        if isinstance(average, BaseAveragedModel):
            if wanted is not None:
                raise TypeError(
                    f"evaluated_sigma_rel goes with PowerFunctionEMA, which keeps averages of "
                    f"several widths, and {type(average).__name__} keeps one: leave it out"
                )
        elif isinstance(average, PowerFunctionEMA):
            widths = average.sigma_rel
            if wanted not in widths and (wanted is not None or len(widths) > 1):
                raise ValueError(
                    f"evaluated_sigma_rel is {wanted}, and averages of "
                    f"{', '.join(map(str, widths))} are kept; say which of them is evaluated"
                )
        else:
            raise TypeError(
                f"the function given to EMACallback returned a {type(average).__name__}; an "
                f"averaged model is expected, say ema_fused.ExponentialMovingAverage(model)"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Updates the average with the model, unless the step was skipped."""
        assert self.average is not None
        if not step_was_skipped(self._trainer.accelerator):
            self.average.update_parameters(self._trainer.model)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Loads the best checkpoint's average if the trainer has loaded its model."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(state.best_model_checkpoint)

    @contextmanager
    def _training(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Keeps ``resume_from_checkpoint``, an argument of ``train``, for ``on_train_begin``."""
        folder = arguments.get("resume_from_checkpoint")
        if folder is True:
            folder = get_last_checkpoint(self._trainer.args.output_dir)
        self._resumed_from = folder or None
        self._adapters_before = adapters_in(self._model())
        try:
            yield
        finally:
            self._resumed_from = None

    # Wraps the loop, not evaluate(): after the loop evaluate() calls the callbacks, which may save
    # the model and must find its own weights.
    def _evaluation(self, _: dict[str, Any]) -> AbstractContextManager[Any]:
        if self.average is None:
            return nullcontext()
        trainer, args = self._trainer, self._trainer.args
        if not trainer.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
            # The loop would convert the model while the averages are in it, and they couldn't be
            # swapped out again. (The trainer doesn't convert the model back either.)
            trainer.model.to(torch.float16 if args.fp16_full_eval else torch.bfloat16)
        return self.swapped()

    @contextmanager
    def _saving(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Writes the average right after the model is written.

        A checkpoint's ``trainer_state.json`` is written later, so every checkpoint that can be
        resumed has its average. The folder is written beside its place and renamed, and is begun
        before the model is written: where a program was killed meanwhile, the folder beside tells.
        """
        args = self._trainer.args
        if self.average is None or not (self._is_spread() or args.should_save):
            yield
            return
        at = Path(arguments.get("output_dir") or args.output_dir) / AVERAGED
        with self._first() as is_first:
            if is_first:
                whole_files.begin_beside(at)
        yield
        beside = whole_files.beside(at)
        self._write(beside, whole=self._writes_whole())
        if self._is_spread():
            write_shards(self.average, self._trainer.model, beside / _SHARDS)
        with self._first() as is_first:
            if is_first:
                self._describe(beside)
                whole_files.put_in_place(at)

    def _write(self, folder: Path, *, whole: bool) -> None:
        """Writes the averages for ``from_pretrained``, and what the trainer saves beside a model.

        With the rest of the average's state, unless that is in shards.
        """
        average, sigma_rel = self.average, self.evaluated_sigma_rel
        assert average is not None
        if not self._is_spread():
            write(average, self._model(), folder, sigma_rel=sigma_rel)
        elif whole:
            write_whole(average, self._trainer.model, self._model(), folder)  # type: ignore[arg-type]
        tokenizer = getattr(self._trainer, "processing_class", None)
        if tokenizer is not None and whole:
            with self._first() as is_first:
                if is_first:
                    tokenizer.save_pretrained(folder)

    def _describe(self, folder: Path) -> None:
        assert self.average is not None
        step, processes = self._trainer.state.global_step, self._trainer.args.world_size
        shards = _SHARDS if self._is_spread() else None
        describe(self.average, folder, step=step, processes=processes, shards=shards)

    def _is_spread(self) -> bool:
        return self.average is not None and is_spread(self.average, self._trainer.model)

    def _first(self) -> AbstractContextManager[bool]:
        """The first process works and the others wait, where each has a part of the average."""
        return by_the_first() if self._is_spread() else nullcontext(True)

    def _writes_whole(self) -> bool:
        """Whether the trainer gathers the model for its own checkpoints."""
        trainer = self._trainer
        if trainer.is_fsdp_enabled:
            plugin = trainer.accelerator.state.fsdp_plugin
            return "FULL_STATE_DICT" in str(plugin.state_dict_type)
        if trainer.is_deepspeed_enabled and self._is_spread():
            return bool(trainer.model_wrapped.zero_gather_16bit_weights_on_model_save())
        return True

    def _model(self) -> nn.Module:
        """The model without wrappers: the average's copy needs its ``save_pretrained``."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        unwrapped: nn.Module = getattr(model, "_orig_mod", model)
        return unwrapped

    def _load(self, checkpoint: str) -> None:
        average, trainer = self.average, self._trainer
        assert average is not None
        folder = Path(checkpoint) / AVERAGED
        is_begun, is_there, has_shards = (
            as_the_first_sees(place.is_dir()) if self._is_spread() else place.is_dir()
            for place in (whole_files.beside(folder), folder, folder / _SHARDS)
        )
        if is_begun:
            raise RuntimeError(
                f"the program was killed while it saved into {checkpoint}, which may hold the "
                f"model of one step and the average of another. Resume from another checkpoint, or "
                f"remove {whole_files.beside(folder).name!r} there to take what there is"
            )
        if has_shards:
            read_shards(average, trainer.model, folder / _SHARDS)
        elif is_there:
            read(average, self._model(), folder, sigma_rel=self.evaluated_sigma_rel)
        else:
            resuming.start(average, trainer.model, checkpoint, f"no folder {AVERAGED!r}")
