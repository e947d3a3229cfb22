"""Updates an average after each step that an optimizer really makes, in any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.engine.graphs import outside_graphs
from ema_fused.modules.sharding import drop_gathered


class Averaged(Protocol):
    """An averaged model: ours, torch's ``AveragedModel``, or another with this method."""

    def update_parameters(self, model: nn.Module, /) -> None: ...


class Attachment:
    """The link between an average and its optimizer; a context manager that detaches at its end."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def detach(self) -> None:
        """Ends the updates. Further calls do nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attach(optimizer: Optimizer, model: nn.Module, averaged: Averaged) -> Attachment:
    """Updates ``averaged`` with ``model`` after each step that ``optimizer`` really makes.

    There is one update per step, however many micro-batches the step takes. A step that
    ``torch.amp.GradScaler`` skips because of overflowed gradients is not counted. The scaler
    doesn't call most optimizers then. A fused optimizer is called and reads a flag on the device;
    our update reads the same flag there, without synchronising
    (:meth:`BaseAveragedModel.update_parameters`; for other averaged models the host waits for the
    flag).

    If the average is updated in parallel with training (``offload``, ``overlap``), the next step of
    any optimizer with a parameter of the model waits until the update has read the model; so does
    loading into the model. Other code must call ``averaged.wait_until_read()`` before it writes the
    parameters.

    The optimizer's ``state_dict`` is unchanged. A pickled or copied optimizer isn't attached:
    attach the copy if it should update an average too.

    Args:
        optimizer: of ``torch.optim``; if it is wrapped (by Accelerate, say), the one inside.
        model: the model that the optimizer trains, wrapped or not.
        averaged: the average of ``model``.

    Returns:
        An :class:`Attachment`: ``detach()`` ends it; so does the end of a ``with`` block.

    Raises:
        RuntimeError: ``averaged`` is already attached to ``optimizer``.
        TypeError: an argument is of a wrong type.
        ValueError: the optimizer has no parameter of the model at the time of the call; parameters
            added later (``add_param_group``) don't count.
    """
    hooked = getattr(optimizer, "register_step_post_hook", None)
    if hooked is None:
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}, which has no register_step_post_hook; "
            f"a torch.optim.Optimizer is expected (of a wrapper the one inside: wrapper.optimizer)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; a torch.nn.Module is expected")
    if not callable(getattr(averaged, "update_parameters", None)):
        raise TypeError(
            f"the average is a {type(averaged).__name__}, which has no update_parameters(model); "
            f"pass an averaged model, ema_fused's or torch's"
        )
    if _is_attached(optimizer, averaged):
        raise RuntimeError(
            "the average is attached to this optimizer already, and every step would update it "
            "twice; attach it once, or call detach() on what the first attach returned"
        )
    drop_gathered(model)
    if not _trains(optimizer, model):
        raise ValueError(
            "the optimizer has no parameter of the model, so its steps wouldn't change what is "
            "averaged; pass the optimizer that trains this model, made after the model was moved "
            "or wrapped"
        )

    update = partial(_update, averaged, model)
    if not isinstance(averaged, BaseAveragedModel) or not averaged.runs_beside:
        return Attachment(hooked(update))
    wait = _waits_for(averaged, model)
    before_steps = register_optimizer_step_pre_hook(wait)
    # The hook is global, for all optimizers, so it must be removed with the average.
    weakref.finalize(averaged, before_steps.remove)
    before_loading = model.register_load_state_dict_pre_hook(wait)
    return Attachment(hooked(update), before_steps, before_loading)


@outside_graphs
def _update(averaged: Averaged, model: nn.Module, optimizer: Optimizer, _: Any, __: Any) -> None:
    """The hook that runs after each step."""
    # GradScaler sets it on a fused optimizer, which reads it to decide whether to step.
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    with torch.no_grad():
        if isinstance(averaged, BaseAveragedModel):
            averaged.update_parameters(model, found_inf=found_inf, asynchronous=True)
        elif found_inf is None or not bool(found_inf):
            averaged.update_parameters(model)


def _is_attached(optimizer: Any, averaged: Averaged) -> bool:
    """Whether ``averaged`` is attached; looked up in the optimizer's hooks, so never outdated."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", {}).values()
    ours = (hook for hook in hooks if isinstance(hook, partial) and hook.func is _update)
    return any(hook.args[0] is averaged for hook in ours)


def _trains(optimizer: Optimizer, model: nn.Module) -> bool:
    trained = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    return any(id(parameter) in trained for parameter in model.parameters())


def _waits_for(averaged: BaseAveragedModel, model: nn.Module) -> Callable[..., None]:
    """The hook that runs before ``model`` is written: by an optimizer's step, or by loading.

    It has weak references only. Optimizers of other models don't wait.
    """
    average, trained = weakref.ref(averaged), weakref.ref(model)
    # Whether an optimizer trains the model, by its number of parameters: finding out takes longer
    # than an update, so it is repeated only when the number changes.
    known: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()

    def wait(writer: Any, *_: Any) -> None:
        living, its_model = average(), trained()
        if living is None or its_model is None:
            return
        if isinstance(writer, Optimizer):
            count = sum(len(group["params"]) for group in writer.param_groups)
            if known.get(writer, (-1, False))[0] != count:
                known[writer] = count, _trains(writer, its_model)
            if not known[writer][1]:
                return
        living.wait_until_read()

    return wait
