"""Averages that are kept in the states of optimizers, as torchtitan's are, and one plan for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, is_not, methodcaller
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ema_fused.engine.dtensors import local
from ema_fused.engine.plan import Plan
from ema_fused.modules.sharding import drop_gathered
from ema_fused.modules.watch import ModuleWatch
from ema_fused.offloading.offloaded_plan import OffloadedPlan

KEY = "ema_params"  # of an average in the state of its optimizer

_REQUIRES_GRAD = attrgetter("requires_grad")
_AVERAGE = methodcaller("get", KEY)


class Tracked(NamedTuple):
    """Tensors of one part of a model, by name, and the optimizer whose state has their averages."""

    optimizer: Optimizer | None  # None: nothing was tracked there
    named: list[tuple[str, Tensor]]


Find = Callable[[], list[Tracked]]


class StateAverages:
    """The updates of all averages: prepared once, prepared again where something was replaced.

    Args:
        parts: the parts of the model.
        offload: the averages are in host memory and updated by a thread.
    """

    def __init__(self, parts: Sequence[nn.Module], *, offload: bool) -> None:
        self._parts = parts
        self._kind = OffloadedPlan if offload else Plan
        self._plan: Plan | OffloadedPlan | None = None

    def average_(self, weight: float, find: Find) -> None:
        """Averages the tensors as they are now.

        Args:
            weight: of the model's values.
            find: the tensors to average as the model is now; called if it has changed.

        Raises:
            RuntimeError: a tensor has no average.
            If an error is raised, the averages are unchanged.
        """
        plan = self.plan(find)
        try:
            plan.lerp_(weight)
        except ValueError:  # a module was converted in place
            self._prepare(find).lerp_(weight)

    def copy_(self, find: Find) -> None:
        """Sets the averages to the tensors as they are now; raises as :meth:`average_`."""
        self._prepare(find).copy_()

    def plan(self, find: Find) -> Plan | OffloadedPlan:
        """The plan of the pairs as they are now."""
        if self._plan is None or not self._holds():
            return self._prepare(find)
        return self._plan

    def wait_until_read(self) -> None:
        """Waits until no update reads the model."""
        if isinstance(self._plan, OffloadedPlan):
            self._plan.wait_until_read()

    def flush(self) -> None:
        """Waits until all updates are in the averages."""
        if isinstance(self._plan, OffloadedPlan):
            self._plan.flush()

    def _holds(self) -> bool:
        """Whether all tensors, averages and states are the objects that were planned."""
        return not (
            self._slots_changed()
            or list(map(_REQUIRES_GRAD, self._parameters)) != self._trained
            or any(optimizer.state is not known for optimizer, known in self._states)
            or any(map(is_not, map(_AVERAGE, self._entries), self._averages))
        )

    def _prepare(self, find: Find) -> Plan | OffloadedPlan:
        self.flush()
        for part in self._parts:
            drop_gathered(part)  # FSDP2 has other parameters while it has gathered them
        slots_changed = ModuleWatch(*self._parts).changed
        groups = find()
        _refuse_untracked(groups)
        pairs = [
            (name, tensor, optimizer.state[tensor])
            for optimizer, named in groups
            if optimizer is not None
            for name, tensor in named
        ]
        entries = [entry for _, _, entry in pairs]
        averages = list(map(_AVERAGE, entries))
        plan = self._kind(
            [local(average) for average in averages],
            [local(tensor) for _, tensor, _ in pairs],
            names=[name for name, _, _ in pairs],
        )
        # Assigned only now, so that an error above leaves the earlier plan in place.
        self._slots_changed = slots_changed
        self._parameters = [parameter for part in self._parts for parameter in part.parameters()]
        self._trained = list(map(_REQUIRES_GRAD, self._parameters))
        self._states = [
            (optimizer, optimizer.state) for optimizer, _ in groups if optimizer is not None
        ]
        self._entries = entries
        self._averages = averages
        self._plan = plan
        return plan


def _refuse_untracked(groups: list[Tracked]) -> None:
    """Raises RuntimeError if a tensor has no average."""
    untracked = list(_untracked(groups))
    if not untracked:
        return
    count = sum(len(named) for _, named in groups)
    name, first = untracked[0]
    raise RuntimeError(
        f"EMA has no state for {len(untracked)} of {count} tensors (first: {name!r}, shape "
        f"{tuple(first.shape)}, dtype {first.dtype}): it tracks the tensor objects that were there "
        f"when it was made. Don't unfreeze a parameter, replace a tensor or rebuild a part of the "
        f"model afterwards; make the EMA when the model is final"
    )


def _untracked(groups: list[Tracked]) -> Iterator[tuple[str, Tensor]]:
    for optimizer, named in groups:
        for name, tensor in named:
            if optimizer is None or KEY not in optimizer.state.get(tensor, {}):
                yield name, tensor
