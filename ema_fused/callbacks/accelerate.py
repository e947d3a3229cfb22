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
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.callbacks.skipped_steps import listen, step_was_skipped
from ema_fused.frameworks import missing
from ema_fused.posthoc.power_function import PowerFunctionEMA

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing("accelerate", "accelerate", error) from error

__all__ = ["update_average"]


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
        TypeError: ``accelerator`` or ``average`` is something else.
        KeyError, ValueError, RuntimeError: as :meth:`BaseAveragedModel.update_parameters`.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"accelerator is a {type(accelerator).__name__}; an accelerate.Accelerator is expected"
        )
    if not isinstance(average, BaseAveragedModel | PowerFunctionEMA):
        raise TypeError(
            f"average is a {type(average).__name__}; an averaged model is expected, say "
            f"ema_fused.ExponentialMovingAverage(model)"
        )
    if not accelerator.sync_gradients:
        return False
    was_skipped = step_was_skipped(accelerator)
    listen(accelerator)
    if was_skipped:
        return False
    average.update_parameters(model)
    return True
