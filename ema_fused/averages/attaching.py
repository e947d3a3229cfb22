"""Updates an average after each step that an optimizer really makes, in any training loop."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.real_steps import RealSteps, Round, Rounds, all_skipped, is_optimizer
from ema_fused.modules.sharding import drop_gathered
from ema_fused.modules.stepping import before_steps_of, trains

_CHANGES_BEFORE_WARNING = 3


class Averaged(Protocol):
    """An averaged model: ours, torch's ``AveragedModel``, or another with this method."""

    def update_parameters(self, model: nn.Module, /) -> None: ...


class Attachment:
    """The link between an average and its optimizer; a context manager that detaches at its end.

    It doesn't keep the average alive, nor does the optimizer: an average that nobody else holds
    can't be read, and is let go.

    Args:
        following: what updates the average.
    """

    def __init__(self, following: _Following) -> None:
        self._following = following

    def detach(self) -> None:
        """Ends the updates. Further calls do nothing."""
        self._following.end_round()
        self._following.stop()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.detach()
        else:
            self._following.stop()


def attach(optimizer: Any | Sequence[Any], model: nn.Module, averaged: Averaged) -> Attachment:
    """Updates ``averaged`` with ``model`` after each step that ``optimizer`` really makes.

    There is one update per step, however many micro-batches the step takes. A step that
    ``torch.amp.GradScaler`` skips because of overflowed gradients is not counted. The scaler
    doesn't call most optimizers then. A fused optimizer is called and reads a flag on the device;
    our update reads the same flag there, without synchronising
    (:meth:`BaseAveragedModel.update_parameters`; for other averaged models the host waits for the
    flag).

    A wrapper (Accelerate's and Fabric's prepared optimizers, opacus' ``DPOptimizer``, SAM,
    Lookahead) is followed together with the optimizer that it keeps in an attribute: a step is one
    of that, and the update comes when the wrapper's ``step`` has ended.

    Several optimizers, each of a part of the model, take one update a round: after all of them
    have stepped. If some step less often or are skipped, a round ends after the one that usually
    comes last, or before the first would step again; its update comes that late.

    If the average is updated in parallel with training (``offload``, ``overlap``), the next step of
    any optimizer with a parameter of the model waits until the update has read the model; so does
    loading into the model. Other code must call ``averaged.wait_until_read()`` before it writes the
    parameters.

    The optimizer's ``state_dict`` is unchanged. A pickled or copied optimizer isn't attached:
    attach the copy if it should update an average too. The optimizer doesn't keep the average
    alive: one that nobody else holds is let go (of a notebook's cell that was run again, say).

    Args:
        optimizer: of ``torch.optim``, or a wrapper of one; or a list of them.
        model: the model that the optimizer trains, wrapped or not.
        averaged: the average of ``model``.

    Returns:
        An :class:`Attachment`: ``detach()`` ends it; so does the end of a ``with`` block.

    Raises:
        RuntimeError: ``averaged`` is already attached to ``optimizer``.
        TypeError: an argument is of a wrong type; or DeepSpeed's engine makes the model's steps.
        ValueError: the optimizer has no parameter of the model at the time of the call; parameters
            added later (``add_param_group``) don't count. Or an optimizer is listed twice.

    Warns:
        UserWarning: ``averaged`` is attached to another optimizer too; or, once, later: the weights
            change and no step comes, or the average is gone and a part of it is still in use.
    """
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    _check_types(optimizers, model, averaged)
    drop_gathered(model)
    each = [RealSteps(one) for one in optimizers]
    innermost = [one for steps in each for one in steps.innermost]
    _check_not_attached(innermost, averaged)
    for given, steps in zip(optimizers, each, strict=True):
        if not any(trains(one, model) for one in steps.innermost):
            raise ValueError(
                f"the optimizer ({type(given).__name__}) has no parameter of the model, so its "
                f"steps wouldn't change what is averaged; pass the optimizer that trains this "
                f"model, made after the model was moved or wrapped"
            )
    following = _Following(averaged, model, innermost)
    following.listen(each)
    if isinstance(averaged, BaseAveragedModel) and averaged.runs_beside:
        wait = functools.partial(_wait, weakref.ref(averaged))
        before_steps = before_steps_of(model, wait)
        # The hook is global, for all optimizers, so it must be removed with the average.
        weakref.finalize(averaged, before_steps.remove)
        # nn.Module's own function: a model compiled by TorchScript refuses the public method.
        register: Any = nn.Module._register_load_state_dict_pre_hook
        before_loading = register(model, wait, with_module=True)
        following.ends += [before_steps.remove, before_loading.remove]
    following.watch_for_changes(model, innermost, " and ".join(_names_of(optimizers)))
    return Attachment(following)


class _Following:
    """What updates one average after the steps of its optimizers; it keeps none of them alive.

    Attributes:
        averaged: returns the average; None if it has been garbage-collected.
        optimizers: weak references to the optimizers that write the weights.
        ends: what removes the hooks.
    """

    def __init__(self, averaged: Averaged, model: nn.Module, optimizers: list[Any]) -> None:
        try:
            let_go = functools.partial(_let_go, weakref.ref(self))
            self.averaged: Callable[[], Averaged | None] = weakref.ref(averaged, let_go)
        except TypeError:  # without weak references it is kept
            self.averaged = lambda: averaged
        self.model: nn.Module | None = model
        self.optimizers = [weakref.ref(one) for one in optimizers]
        self.ends: list[Callable[[], None]] = []
        self._rounds: Rounds | None = None
        self._on_gradients: Any = None
        # A user may keep the averaged module alone, and would wait for updates in vain.
        inside: nn.Module | None = None
        if isinstance(averaged, BaseAveragedModel):
            inside = averaged._averages()
        elif isinstance(averaged, nn.Module):
            inside = next(averaged.children(), None)
        self._part = None if inside is None else weakref.ref(inside)
        _followings.add(self)

    def listen(self, each: list[RealSteps]) -> None:
        if len(each) == 1:
            self.ends += each[0].listen(self.update)
            return
        self._rounds = Rounds(len(each))
        for which, steps in enumerate(each):
            self.ends += steps.listen(
                functools.partial(self._after_step, self._rounds, which),
                functools.partial(self._before_step, self._rounds, which),
            )

    def _before_step(self, rounds: Rounds, which: int) -> None:
        ended = rounds.before(which)
        if ended:
            self._update_after(ended)
            averaged = self.averaged()
            if isinstance(averaged, BaseAveragedModel):
                averaged.wait_until_read()

    def _after_step(self, rounds: Rounds, which: int, found_inf: Tensor | None) -> None:
        self._update_after(rounds.has_stepped(which, found_inf))

    def _update_after(self, ended: Round) -> None:
        if ended:
            self.update(all_skipped(ended.values()))

    def update(self, found_inf: Tensor | None) -> None:
        averaged, model = self.averaged(), self.model
        if averaged is None:
            return self._say_what_is_lost()
        if model is None:
            return
        self._stop_looking()
        with torch.no_grad():
            if isinstance(averaged, BaseAveragedModel):
                averaged.update_parameters(model, found_inf=found_inf, asynchronous=True)
            elif found_inf is None or not bool(found_inf):
                averaged.update_parameters(model)

    def end_round(self) -> None:
        """Makes the update of a round that hasn't come to its end."""
        if self._rounds is not None:
            self._update_after(self._rounds.end())

    def stop(self) -> None:
        """Updates nothing any more. Further calls do nothing."""
        _followings.discard(self)
        for end in self.ends:
            end()
        self._stop_looking()
        self.model = None

    def _stop_looking(self) -> None:
        if self._on_gradients is not None:
            self._on_gradients.remove()
            self._on_gradients = None

    def watch_for_changes(self, model: nn.Module, optimizers: list[Any], names: str) -> None:
        """Warns if the weights change and no step comes: an optimizer's ``step`` isn't called.

        It looks at one parameter, in backward passes, until the first step has come.
        """
        for parameter in model.parameters():
            # Others have gradients in other ways, or no version.
            if type(parameter) is not nn.Parameter or not parameter.requires_grad:
                continue
            if any(_has(optimizer, parameter) for optimizer in optimizers):
                look = _Look(weakref.ref(self), names)
                self._on_gradients = parameter.register_post_accumulate_grad_hook(look)
                return

    def _say_what_is_lost(self) -> None:
        part, self._part = self._part, None
        if part is not None and part() is not None:
            gc.collect()  # reference cycles may keep it
        if part is not None and part() is not None:
            warnings.warn(
                "the averaged model that was attached to the optimizer is gone and isn't updated "
                "any more, but its module is still in use: keep the averaged model itself",
                stacklevel=2,
            )


# Those that are attached; they live in the hooks of their optimizers.
_followings: weakref.WeakSet[_Following] = weakref.WeakSet()


def _let_go(following: weakref.ref[_Following], _: object) -> None:
    """The average is gone: frees the model too. The hooks stay, as one of them may be running."""
    ended = following()
    if ended is not None:
        ended.model = None


class _Look:
    """Counts how often a parameter has changed, until there is a step."""

    def __init__(self, following: weakref.ref[_Following], names: str) -> None:
        self._following = following
        self._names = names
        self._version: int | None = None
        self._changes = 0

    def __call__(self, parameter: Tensor) -> None:
        if self._version is not None and parameter._version != self._version:
            self._changes += 1
        self._version = parameter._version
        if self._changes != _CHANGES_BEFORE_WARNING:
            return
        self._changes += 1
        following = self._following()
        if following is not None and following.model is not None:
            warnings.warn(
                f"the model's weights have changed {_CHANGES_BEFORE_WARNING} times since attach(), "
                f"and {self._names} made no step that calls hooks, so the average isn't updated; "
                f"attach the optimizer that steps (of a wrapper the one inside), or call "
                f"averaged.update_parameters(model) after each step",
                stacklevel=2,
            )


def _wait(averaged: weakref.ref[BaseAveragedModel], *_: Any) -> None:
    """Before the model is written: by an optimizer's step, or by loading."""
    living = averaged()
    if living is not None:
        living.wait_until_read()


def _has(optimizer: Any, parameter: Tensor) -> bool:
    return any(parameter is one for group in optimizer.param_groups for one in group["params"])


def _names_of(values: Sequence[Any]) -> list[str]:
    return [type(value).__name__ for value in values]


def _check_types(optimizers: list[Any], model: Any, averaged: Any) -> None:
    order = "The arguments are attach(optimizer, model, averaged), in this order"
    if not optimizers:
        raise TypeError(f"the list of optimizers is empty; pass those of the model. {order}")
    for one in optimizers:
        if _is_stepped_by_deepspeed(one, model):
            raise TypeError(
                f"DeepSpeed's engine makes the steps of this model, by optimizers that have flat "
                f"copies of its parameters ({type(one).__name__}); update after its steps instead: "
                f"engine.step(), and then, if engine.was_step_applied(), "
                f"averaged.update_parameters(engine.module)"
            )
        if isinstance(one, nn.Module) or not is_optimizer(one):
            raise TypeError(
                f"the optimizer is a {type(one).__name__}; a torch.optim.Optimizer, a wrapper of "
                f"one, or a list of them is expected{_instead_of(one)}. {order}"
            )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is a {type(model).__name__}; a torch.nn.Module is expected. {order}"
        )
    if not callable(getattr(averaged, "update_parameters", None)):
        raise TypeError(
            f"the average is a {type(averaged).__name__}, which has no update_parameters(model); "
            f"pass an averaged model, ema_fused's or torch's. {order}"
        )


def _is_stepped_by_deepspeed(optimizer: Any, model: Any) -> bool:
    if hasattr(optimizer, "was_step_applied"):  # the engine itself
        return True
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    # Marks of ZeRO-3, and of ZeRO-1, ZeRO-2 and bf16.
    return any(hasattr(one, "ds_id") or hasattr(one, "_hp_mapping") for one in parameters)


def _instead_of(value: Any) -> str:
    if hasattr(value, "unscale_"):
        return "; of a GradScaler pass the optimizer that it steps, scaler.step(optimizer)"
    if hasattr(value, "optimizer") or hasattr(value, "optimizers"):
        return f"; of a {type(value).__name__} pass the optimizer that it holds"
    return ""


def _check_not_attached(optimizers: list[Any], averaged: Averaged) -> None:
    if len({id(one) for one in optimizers}) < len(optimizers):
        raise ValueError(
            "an optimizer is listed twice, itself or inside of a wrapper; pass each once"
        )
    attached: list[Any] = []
    for following in list(_followings):
        if following.averaged() is None:
            following.stop()
        elif following.averaged() is averaged:
            attached += [one for one in (known() for known in following.optimizers) if one]
    if any(one is known for one in optimizers for known in attached):
        raise RuntimeError(
            "the average is attached to this optimizer already, and every step would update it "
            "twice; attach it once, or call detach() on what the first attach returned"
        )
    if attached:
        warnings.warn(
            f"the average is attached to another optimizer too ({', '.join(_names_of(attached))}), "
            f"and is updated after the steps of each: twice in a step that both make. For one "
            f"update after all of them pass a list, attach([one, other], model, averaged); or call "
            f"detach() on what the first attach returned",
            stacklevel=3,
        )
