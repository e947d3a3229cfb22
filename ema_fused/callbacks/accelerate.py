"""An average of a model that is trained with Hugging Face's ``accelerate``.

Our averaged models need no wrapper there: checkpoints save their ``state_dict``, and they accept
models that ``prepare`` has wrapped. The loop only has to decide when to update::

    average = ExponentialMovingAverage(model, momentum=0.001)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    accelerator.register_for_checkpointing(average)  # save_state() and load_state() take it along

    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            update_average(accelerator, average, model)

    model.eval()
    with average.swapped(model):
        evaluate(model)
    accelerator.save_model(average.module, "averaged")

Under FSDP and DeepSpeed make the average after ``prepare``, which shards the model, and let
checkpoints take each process's part of it along::

    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    average = AveragedWeights(model, momentum=0.001)
    register_average(accelerator, average, model)  # not register_for_checkpointing(average)
    ...
    export_safetensors(average.weights, "averaged")  # of ema_fused.saving

That gathers tensor by tensor. Under FSDP2 ``accelerator.save_model(average.module, "averaged")``
writes the same, with the whole model in the first process's host memory; all processes call it.
Under ZeRO-3 ``save_model`` takes DeepSpeed's engine alone: inside ``average.swapped(model)``
``accelerator.save_model(model, "averaged")`` writes the averages in the model's dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.callbacks.shards import (
    as_the_first_sees,
    check_can_be_saved,
    is_spread,
    read_shards,
    write_shards,
)
from ema_fused.callbacks.skipped_steps import listen, step_was_skipped
from ema_fused.frameworks import missing
from ema_fused.posthoc.power_function import PowerFunctionEMA
from ema_fused.saving import checkpoints, resuming

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing("accelerate", "accelerate", error) from error

__all__ = ["register_average", "update_average"]

# Averages of which each process is known to have all.
_whole: weakref.WeakSet[Any] = weakref.WeakSet()


def register_average(
    accelerator: Any,
    average: BaseAveragedModel | PowerFunctionEMA,
    model: nn.Module,
    *,
    name: str = "averaged",
) -> None:
    """Lets ``save_state()`` and ``load_state()`` take ``average`` along, sharded or not.

    The average is written into a folder of the checkpoint by :mod:`ema_fused.saving.checkpoints`,
    a sharded one by each process its part; any number of processes loads it. (What
    ``register_for_checkpointing`` registers is pickled by the first process: the others' parts
    would be lost.) A checkpoint without that folder starts the average from the weights there, with
    one warning. Averages of a ``PowerFunctionEMA`` are registered for checkpointing.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        average: the average of ``model``, made after ``prepare``.
        model: as ``prepare`` returned it.
        name: of the folder; another for each average.

    Raises:
        TypeError: ``accelerator`` or ``average`` is something else.
        ValueError: averages of FSDP1's parameters have another dtype, and couldn't be saved.
    """
    _check(accelerator, average)
    if isinstance(average, PowerFunctionEMA):
        accelerator.register_for_checkpointing(average)
        return
    check_can_be_saved(average, model)

    def save(_: list[nn.Module], __: list[Any], folder: str) -> None:
        write_shards(average, model, Path(folder) / name)

    def load(to_be_loaded: list[nn.Module], folder: str) -> None:
        def start(*_: object) -> None:
            resuming.start(average, model, folder, f"no folder {name!r}")

        if as_the_first_sees(checkpoints.exists(Path(folder) / name)):
            read_shards(average, model, Path(folder) / name)
        elif not to_be_loaded:  # FSDP and DeepSpeed have loaded it by now
            start()
        else:
            _once_loaded(accelerator.unwrap_model(model), start)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _once_loaded(model: nn.Module, call: Callable[[], None]) -> None:
    """Calls ``call`` when a state has been loaded into ``model``, the next time."""

    def loaded(*_: object) -> None:
        handle.remove()
        call()

    inside: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile's wrapper has no state
    handle = inside.register_load_state_dict_post_hook(loaded)


def update_average(
    accelerator: Any, average: BaseAveragedModel | PowerFunctionEMA, model: nn.Module
) -> bool:
    """Updates ``average`` with ``model`` if the optimizer has just made a step.

    The optimizer makes no step while gradients are accumulated, or if the gradient scaler found an
    overflow; of a fused optimizer the scaler's flag says so, and it is waited for. Call this
    function after ``optimizer.step()``, for each batch.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        average: the average of ``model``; or its averages, a
            :class:`~ema_fused.PowerFunctionEMA`, whose time is counted in steps then.
        model: the model, wrapped by ``prepare`` or not.

    Returns:
        Whether the average was updated.

    Raises:
        TypeError: ``accelerator`` or ``average`` is something else; or the average is sharded, and
            is registered for checkpoints that would hold the first process's part alone.
        KeyError, ValueError, RuntimeError: as :meth:`BaseAveragedModel.update_parameters`.
    """
    _check(accelerator, average)
    _refuse_pickled(accelerator, average, model)
    if not accelerator.sync_gradients:
        return False
    was_skipped = step_was_skipped(accelerator)
    listen(accelerator)
    if was_skipped:
        return False
    average.update_parameters(model)
    return True


def _check(accelerator: object, average: object) -> None:
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"accelerator is a {type(accelerator).__name__}; an accelerate.Accelerator is expected"
        )
    if not isinstance(average, BaseAveragedModel | PowerFunctionEMA):
        raise TypeError(
            f"average is a {type(average).__name__}; an averaged model is expected, say "
            f"ema_fused.ExponentialMovingAverage(model)"
        )


def _refuse_pickled(accelerator: Any, average: Any, model: nn.Module) -> None:
    if average in _whole or not any(one is average for one in accelerator._custom_objects):
        return
    if is_spread(average, model):
        raise TypeError(
            f"this {type(average).__name__} is sharded, and accelerate would save the first "
            f"process's part of what is registered for checkpointing, and load it everywhere; call "
            f"register_average(accelerator, average, model) of ema_fused.callbacks.accelerate "
            f"instead of accelerator.register_for_checkpointing(average)"
        )
    _whole.add(average)
