"""TRL's ``BEMACallback`` with our averages, which a resumed run goes on with."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.averages.bias_corrected import BiasCorrectedEMA
from ema_fused.callbacks.shards import is_spread
from ema_fused.engine.graphs import outside_graphs
from ema_fused.frameworks import missing
from ema_fused.modules.copying import averaged_copy
from ema_fused.modules.skeleton import wrapped_by
from ema_fused.saving.whole_files import written_whole

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing("transformers", "transformers", error) from error

logger = logging.getLogger(__name__)

STATE = "bema_state.pt"
"""The file in each checkpoint."""


class BEMACallback(TrainerCallback):  # type: ignore[misc]
    """TRL's ``BEMACallback``, also that of ``trl.experimental``, which updates a reference model.

    :attr:`running_model` has the bias-corrected averages (:class:`~ema_fused.BiasCorrectedEMA`) of
    the last update, bitwise the original's; the folder ``bema`` has it when the training ends. Each
    checkpoint has the state of the averages, and ``train(resume_from_checkpoint=...)`` goes on with
    them. Frozen parameters are the model's own, buffers those of the last update, and models with
    PEFT's adapters are averaged too: ``bema`` has their adapter then.

    Args:
        update_freq: steps from one update to the next.
        ema_power: of the average's momentum ``(lag + multiplier * step) ** -ema_power``.
        bias_power: of the correction, ``(lag + multiplier * step) ** -bias_power``.
        lag: what the steps start from.
        update_after: the step whose weights are the initial ones; 0: those before the training.
        multiplier: of the steps.
        min_ema_multiplier: the momentum doesn't fall below it.
        device: of the averages and of :attr:`running_model`.
        update_ref_model: whether the averages are written into a reference model too, the
            ``ref_model`` that the trainer passes (``trl.experimental.bema_for_ref_model``).
        ref_model_update_freq: steps from one such write to the next.
        ref_model_update_after: the step of the first.
        resume_from: the checkpoint with the averages; None: that of the step in ``output_dir``.
            TRL's has no such argument.

    Attributes:
        average: the averages; None before the training.
        running_model: a copy of the model with the corrected averages; None before.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or range, or the model is sharded,
            when the training begins.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
        update_ref_model: bool = False,
        ref_model_update_freq: int = 400,
        ref_model_update_after: int = 0,
        *,
        resume_from: str | None = None,
    ) -> None:
        self.update_freq = update_freq
        self.ema_power = ema_power
        self.bias_power = bias_power
        self.lag = lag
        self.update_after = update_after
        self.multiplier = multiplier
        self.min_ema_multiplier = min_ema_multiplier
        self.device = device
        self.update_ref_model = update_ref_model
        self.ref_model_update_freq = ref_model_update_freq
        self.ref_model_update_after = ref_model_update_after
        self.resume_from = resume_from
        self.average: BiasCorrectedEMA | None = None
        self.running_model: Any = None

    @outside_graphs
    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Makes the averages and the copy of the model; loads them if training is resumed."""
        model = _plain(model)
        average = BiasCorrectedEMA(
            model,
            ema_power=self.ema_power,
            bias_power=self.bias_power,
            lag=self.lag,
            multiplier=self.multiplier,
            min_momentum=self.min_ema_multiplier,
            steps_before=self.update_after,
            device=self.device,
            share_frozen=True,
        )
        _refuse_shards(average, model)
        self.average = average
        average.update_parameters(model)
        # A frozen parameter is shared where it can be: not with another device.
        at = torch.empty(0, device=self.device).device
        is_there = all(parameter.device == at for parameter in model.parameters())
        self.running_model, _ = averaged_copy(model, self.device, None, share_frozen=is_there)
        if state.global_step > 0:
            self._resume(args, state)

    @outside_graphs
    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Updates the averages, and the reference model, if it is time."""
        assert self.average is not None, "on_train_begin comes before"
        step, model = state.global_step, _plain(model)
        since = step - self.update_after
        if since == 0:
            self.average.copy_from(model)
        elif since > 0 and since % self.update_freq == 0:
            self._update(model, since)
            logger.info(f"Updated BEMA weights at step {step}")
        since = step - self.ref_model_update_after
        if self.update_ref_model and since >= 0 and since % self.ref_model_update_freq == 0:
            self._write_reference(model, kwargs)

    @torch.no_grad()
    def _update(self, model: nn.Module, since: int) -> None:
        assert self.average is not None
        steps: Any = self.average.steps
        steps.fill_(since)  # only the calls at which it averages are made
        self.average.update_parameters(model)
        self.average.write_corrected(self.running_model, model)
        buffers = dict(model.named_buffers())
        for name, buffer in self.running_model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])

    def _write_reference(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        if "ref_model" not in kwargs:
            raise ValueError("'ref_model' not found in kwargs.")
        reference = kwargs["ref_model"]
        reference = model if reference is None else _plain(reference)
        if hasattr(model, "peft_config") or hasattr(reference, "peft_config"):
            raise ValueError(
                "update_ref_model=True with PEFT's adapters: the reference is the model without "
                "them, which doesn't train, and has no place for their averages; leave it out"
            )
        reference.load_state_dict(self.running_model.state_dict(), strict=False)
        logger.info("BEMACallback: Updated reference model with BEMA weights")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the state of the averages into the checkpoint that was just saved."""
        if self.average is None or not state.is_world_process_zero:
            return
        folder = self._checkpoint(args, state)
        if not folder.is_dir():
            warnings.warn(
                f"BEMACallback found no checkpoint at {folder}, where the Trainer writes its own, "
                f"and so hasn't saved its averages: a run that is resumed would begin new ones",
                stacklevel=2,
            )
            return
        with written_whole(folder / STATE) as beside:
            torch.save({"average": self.average.state_dict(), "running": self._running()}, beside)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes :attr:`running_model` into the folder ``bema`` of ``output_dir``."""
        if state.is_world_process_zero:
            folder = f"{args.output_dir}/bema"
            self.running_model.save_pretrained(folder)
            logger.info(f"Saved BEMA model to {folder}")

    def _checkpoint(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _running(self) -> dict[str, Tensor]:
        """What of the copy follows from the averages: the rest is the model's."""
        assert self.average is not None
        averaged = self.average.weights.keys() - self.average.shared_names
        state = self.running_model.state_dict()
        return {name: tensor for name, tensor in state.items() if name in averaged}

    def _resume(self, args: Any, state: Any) -> None:
        assert self.average is not None
        folder = Path(self.resume_from) if self.resume_from else self._checkpoint(args, state)
        if not (folder / STATE).is_file():
            warnings.warn(
                f"{folder} has no {STATE}, so it was saved without BEMACallback of ema_fused: the "
                f"averages begin with the model's weights there. Of a checkpoint elsewhere, pass "
                f"resume_from=",
                stacklevel=2,
            )
            return
        saved = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        self.average.load_state_dict(saved["average"])
        self.running_model.load_state_dict(saved["running"], strict=False)


def _refuse_shards(average: BiasCorrectedEMA, model: nn.Module) -> None:
    if is_spread(average, model):
        raise TypeError(
            "BEMACallback keeps running_model, a whole copy of the model, and each process has a "
            "part of the model only; EMACallback(ema_fused.BiasCorrectedEMA, ...).attach(trainer) "
            "averages the parts, and callback.average.swapped_corrected(trainer.model) evaluates "
            "them with the correction"
        )


def _plain(model: nn.Module) -> nn.Module:
    """The model without wrappers."""
    while (inside := wrapped_by(model)) is not None:
        model = inside
    return model
