"""Tells of each step that an optimizer really makes, whatever it is wrapped in.

A wrapper (SAM, Lookahead, those of Accelerate and opacus) keeps in an attribute the optimizer that
writes the weights. Its own ``step`` may do nothing (an accumulated or skipped step), may write the
weights once more afterwards, or may never be called (SAM's ``first_step`` and ``second_step``). So
the innermost optimizer is asked whether there was a step, and the wrapper when it has ended.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ema_fused.engine.graphs import outside_graphs

# Where wrappers keep what they wrap, also if it is a property or a slot; beside these, every
# attribute is looked at, those that begin with an underscore last.
_NAMES = ("optimizer", "base_optimizer", "original_optimizer", "optim")

# Gets the flag that a GradScaler sets on a fused optimizer: unless 0, the step was skipped. None:
# there is no flag, and it was a step.
After = Callable[[Tensor | None], None]


def is_optimizer(value: object) -> bool:
    """Whether ``value`` is an optimizer or a wrapper of one; schedulers have no gradients."""
    has_gradients = hasattr(value, "param_groups") or hasattr(value, "zero_grad")
    return callable(getattr(value, "step", None)) and has_gradients


def _held_by(optimizer: Any) -> list[Optimizer]:
    """The optimizers in the attributes of ``optimizer``, and in lists and dictionaries there."""
    own = sorted(getattr(optimizer, "__dict__", ()), key=lambda name: name.startswith("_"))
    found: dict[int, Optimizer] = {}
    for name in dict.fromkeys((*_NAMES, *own)):
        value = getattr(optimizer, name, None)
        values: Iterable[Any] = (value,)
        if isinstance(value, (list, tuple)):
            values = value
        elif isinstance(value, dict):
            values = value.values()
        for one in values:
            if isinstance(one, Optimizer) and one is not optimizer:
                found.setdefault(id(one), one)
    return list(found.values())


def _parameters_of(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", ())
    return {id(tensor) for group in groups for tensor in group["params"]}


class RealSteps:
    """The steps of one optimizer and of all that it wraps, each real one told once.

    Args:
        optimizer: an optimizer of ``torch.optim`` or derived from one, or a wrapper of some.

    Attributes:
        innermost: the optimizers that write the weights: ``optimizer`` itself, or those that it
            wraps, at any depth. One that wraps others for a part of its parameters alone steps by
            itself.
    """

    def __init__(self, optimizer: Any) -> None:
        self.innermost: list[Any] = []
        self._wrappers: list[Any] = []
        self._sort(optimizer)
        self._running = 0  # steps of wrappers, one inside the other
        self._flags: list[Tensor | None] = []  # of the steps inside of them

    def _sort(self, optimizer: Any) -> None:
        if any(optimizer is known for known in (*self._wrappers, *self.innermost)):
            return
        # Not those around it, which an optimizer may know too.
        around = {id(known) for known in self._wrappers}
        held = [one for one in _held_by(optimizer) if id(one) not in around]
        inside = {number for one in held for number in _parameters_of(one)}
        if not held or not _parameters_of(optimizer) <= inside:
            self.innermost.append(optimizer)
            return
        self._wrappers.append(optimizer)
        for one in held:
            self._sort(one)

    def listen(
        self, after: After, before: Callable[[], None] | None = None
    ) -> list[Callable[[], None]]:
        """Calls ``after`` after each step, and ``before`` before what may become one.

        Returns:
            The functions that end it. They keep nothing alive, as the optimizers keep this object.
        """
        self._after, self._before = after, before
        watches = []
        ends: list[Callable[[], None]] = []
        for optimizer in self.innermost:
            if not _has_plain_hooks(optimizer):
                watches.append(_Watch(optimizer, self, counts=True))
                continue
            if before is not None:
                pre_hook = functools.partial(_before_step, self)
                ends.append(optimizer.register_step_pre_hook(pre_hook).remove)
            hook = functools.partial(_after_step, self)
            ends.append(optimizer.register_step_post_hook(hook).remove)
        for wrapper in self._wrappers:
            if hasattr(wrapper, "__dict__") and callable(getattr(wrapper, "step", None)):
                watches.append(_Watch(wrapper, self, counts=False))
        self._wrappers, self.innermost = [], []
        return ends + [functools.partial(_end, weakref.ref(watch)) for watch in watches]

    @outside_graphs
    def is_about_to_step(self) -> None:
        if self._before is not None and not self._running:
            self._before()

    @outside_graphs
    def has_stepped(self, found_inf: Tensor | None) -> None:
        if self._running:
            self._flags.append(found_inf)
        else:
            self._after(found_inf)

    def run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs ``step`` of a wrapper; what steps inside is told at its end, as one step."""
        self.is_about_to_step()
        self._running += 1
        try:
            result = step(*args, **kwargs)
        except BaseException:
            self._running -= 1
            if not self._running:
                self._flags = []
            raise
        self._running -= 1
        return result

    @outside_graphs
    def has_ended(self, optimizer: Any, counts: bool) -> None:
        """After :meth:`run`; ``counts``: ``optimizer`` has stepped itself."""
        if counts:
            self._flags.append(getattr(optimizer, "found_inf", None))
        if self._running or not self._flags:
            return
        flags, self._flags = self._flags, []
        # A GradScaler that was given the wrapper has set its flag there.
        own = getattr(optimizer, "found_inf", None)
        self._after(all_skipped(flags) if own is None else own)


def all_skipped(flags: Iterable[Tensor | None]) -> Tensor | None:
    """The flag of several steps together: set if each of them was skipped."""
    together, *others = flags
    for flag in others:
        if together is None or flag is None:
            return None
        together = together * flag.to(together.device, non_blocking=True)
    return together


@outside_graphs
def _before_step(steps: RealSteps, _: Optimizer, __: Any, ___: Any) -> None:
    steps.is_about_to_step()


@outside_graphs
def _after_step(steps: RealSteps, optimizer: Optimizer, _: Any, __: Any) -> None:
    steps.has_stepped(getattr(optimizer, "found_inf", None))


def _end(watch: weakref.ref[_Watch]) -> None:
    living = watch()
    if living is not None:
        living.remove()


def _has_plain_hooks(optimizer: Any) -> bool:
    """Whether each call of ``step`` calls the optimizer's hooks, and once.

    torch makes a class's ``step`` call them when the first instance is made. It isn't so where
    ``__init__`` of ``torch.optim.Optimizer`` is left out; and a class whose ``step`` calls its
    base's calls them twice, once both are in use.
    """
    if not isinstance(optimizer, Optimizer):
        return callable(getattr(optimizer, "register_step_post_hook", None))
    if not getattr(type(optimizer).step, "hooked", False):
        return False
    if not isinstance(getattr(optimizer, "_optimizer_step_post_hooks", None), dict):
        return False
    of_torch = (Optimizer, object)
    own = [vars(cls).get("step") for cls in type(optimizer).__mro__ if cls not in of_torch]
    return len({id(inspect.unwrap(step)) for step in own if step is not None}) <= 1


class _Watch:
    """The ``step`` of an optimizer object, in place of its class's; calls that and tells of it.

    Args:
        optimizer: not kept alive.
        steps: what to tell.
        counts: whether a call is a step. Otherwise there is one if something inside has stepped.
    """

    def __init__(self, optimizer: Any, steps: RealSteps, *, counts: bool) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._steps: RealSteps | None = steps
        self._counts = counts
        # What a scheduler of torch, or another of these, has put there before.
        self._before = vars(optimizer).get("step")
        # Marks that others have left on the function, which schedulers look for.
        functools.update_wrapper(self, getattr(optimizer.step, "__func__", optimizer.step))
        optimizer.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        optimizer, steps = self._optimizer(), self._steps
        assert optimizer is not None
        step = self._before or functools.partial(type(optimizer).step, optimizer)
        if steps is None:
            return step(*args, **kwargs)
        result = steps.run(step, *args, **kwargs)
        steps.has_ended(optimizer, self._counts)
        return result

    @property
    def __func__(self) -> Callable[..., Any]:
        """What a scheduler of torch takes out of a method, to wrap it."""
        return lambda _, *args, **kwargs: self(*args, **kwargs)

    def __reduce__(self) -> Any:
        """A copied or pickled optimizer gets its class's method."""
        return getattr, (self._optimizer(), "step")

    def remove(self) -> None:
        self._steps = None
        optimizer = self._optimizer()
        if optimizer is None or vars(optimizer).get("step") is not self:
            return  # wrapped by another meanwhile: the call is passed on
        del optimizer.step
        if self._before is not None:
            optimizer.step = self._before


Round = dict[int, Tensor | None]  # by the optimizer's number, the flag of its step


class Rounds:
    """Makes one step of the steps of several optimizers that train parts of one model.

    A round ends when all of them have stepped. One of them may have been skipped (by a GradScaler)
    or may step less often: so a round also ends after the one that came last in the last whole
    round, and before one would step that has stepped already or comes earlier.

    Args:
        count: how many optimizers.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._order: list[int] = []  # of the last whole round
        self._stepped: Round = {}

    def before(self, which: int) -> Round:
        """Before a step of optimizer number ``which``; the round that has ended with it, or {}."""
        last = next(reversed(self._stepped), None)
        if last is None or which in self._stepped:
            return self.end()
        comes_later = not self._order or self._order.index(which) > self._order.index(last)
        return {} if comes_later else self.end()

    def has_stepped(self, which: int, found_inf: Tensor | None) -> Round:
        """After a step; the round that has ended with it, or {}."""
        self._stepped[which] = found_inf
        is_last = bool(self._order) and which == self._order[-1]
        return self.end() if is_last or len(self._stepped) == self._count else {}

    def end(self) -> Round:
        """Ends the round that is going on: the flags of those that have stepped in it."""
        ended, self._stepped = self._stepped, {}
        if len(ended) == self._count:
            self._order = list(ended)
        return ended
