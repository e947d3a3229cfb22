"""The plans that update paired tensors: on which stream or device, and what is held apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ema_fused.engine.plan import Plan
from ema_fused.modules.module_pairs import Kind, Pair, lists_of, plan_of
from ema_fused.modules.non_finite import NonFiniteBuffers, averaged_buffers, those_non_finite
from ema_fused.offloading.offloaded_plan import OffloadedPlan


class PlannedPairs:
    """Updates pairs by one plan, apart from buffers that hold infinity or NaN.

    Args:
        pairs: the pairs to update.
        arithmetic: as in :class:`~ema_fused.Plan`; likewise ``rounding`` and ``backend``.
        offload: the averages are updated on the host, in a thread.
        stream: the CUDA stream that updates run on; None: the current one.
        mends_buffers: hold averaged buffers with infinity or NaN apart. Which these are is looked
            up once: after the first copy, or before the first average.

    Attributes:
        plan: of all pairs that aren't held apart.
        flush: waits until all updates are in the averages; the host for offloaded ones only.
        wait_until_read: waits until all updates have read the model.

    Raises:
        ValueError: as the plan, from every method too; nothing has been updated then.
    """

    def __init__(
        self,
        pairs: list[Pair],
        *,
        arithmetic: str,
        rounding: str,
        backend: str | None,
        offload: bool,
        stream: torch.cuda.Stream | None,
        mends_buffers: bool,
    ) -> None:
        self._pairs = pairs
        self._options: dict[str, Any] = {
            "arithmetic": arithmetic,
            "rounding": rounding,
            "backend": backend,
        }
        self._backend = backend
        self._offload = offload
        self._stream = stream
        self._is_random = rounding == "stochastic"
        self._is_ordinary = not (offload or stream is not None or self._is_random)
        self._unseen = averaged_buffers(pairs) if mends_buffers else []
        self._apart: NonFiniteBuffers | None = None
        self._is_plain = self._is_ordinary and not self._unseen
        self._make_plan(pairs)

    def _make_plan(self, pairs: list[Pair]) -> None:
        runs_beside = self._offload or self._stream is not None
        snapshot, pairs = _with_snapshots(pairs, self._backend) if runs_beside else (None, pairs)
        kind = OffloadedPlan if self._offload else Plan
        plan = kind(**lists_of(pairs), **self._options)
        # A plan on a device orders its streams, so waiting for the averages and waiting for the
        # reads of the model are the same.
        self.flush, self.wait_until_read = (
            (plan.flush, plan.wait_until_read)
            if isinstance(plan, OffloadedPlan)
            else (plan.wait, plan.wait)
        )
        self.plan: Plan | OffloadedPlan = plan
        self._in_plan = pairs
        self._snapshot = snapshot
        self._listed: tuple[Callable[[str], float], list[float], list[float]] | None = None

    @property
    def compiled(self) -> Any:
        """The extension's Plan if it alone makes a plain average of all pairs; else None."""
        return self.plan.compiled if self._is_plain else None  # type: ignore[union-attr]

    def look_at_buffers(self) -> bool:
        """Holds the buffers with infinity or NaN apart from the plan; looked for once.

        Not done when tensors are paired: the average may be one of the model before its first
        forward pass, and is copied over next.

        Returns:
            False, with nothing done, if a buffer that is held apart isn't as it was planned.
        """
        if self._apart is not None and not self._apart.are_as_planned():
            return False
        if self._unseen:
            apart = those_non_finite(self._unseen)
            if apart:
                self.flush()
                names = {pair.name for pair in apart}
                self._make_plan([pair for pair in self._pairs if pair.name not in names])
                self._apart = NonFiniteBuffers(apart, **self._options)
            self._unseen = []
            self._is_plain = self._is_ordinary and not apart
        return True

    def copy_(self) -> bool:
        """Copies every source into its average; returns as :meth:`look_at_buffers`."""
        if self._apart is not None and not self._apart.are_as_planned():
            return False
        self._take_snapshot()
        self.plan.copy_()
        # Wait for errors now: without this first copy the average would have no valid values.
        self.flush()
        if self._apart is not None:
            self._apart.copy_()
        return self.look_at_buffers()  # now, as the next update may be captured into a graph

    def average_(
        self,
        weight: float | Tensor | Callable[[str], float],
        seed: int,
        step: int | Tensor,
        found_inf: Tensor | None,
        squared_distance: Tensor | None,
    ) -> bool:
        """Averages as ``Pairing.average_``; returns as :meth:`look_at_buffers`."""
        if not self._is_plain and not self.look_at_buffers():
            return False
        plan = self.plan
        of_plan: Any = weight
        apart: Any = weight
        if callable(weight):
            of_plan, apart = self._one_a_pair(weight)
        if self._is_plain and found_inf is None and squared_distance is None:
            plan.lerp_(of_plan)  # the fast path
            return True
        self._take_snapshot()
        if isinstance(plan, OffloadedPlan):
            assert isinstance(of_plan, float) and not isinstance(step, Tensor)
            plan.lerp_(
                of_plan,
                found_inf=found_inf,
                seed=seed,
                step=step,
                squared_distance=squared_distance,
            )
        else:
            if self._is_random:
                plan.seed = seed
            plan.lerp_(
                of_plan,
                found_inf=found_inf,
                step=step if self._is_random else None,
                stream=self._stream,
                squared_distance=squared_distance,
            )
        if self._apart is not None:
            self._apart.average_(apart, seed=seed, step=step, found_inf=found_inf)
        return True

    def _one_a_pair(self, weight_of: Callable[[str], float]) -> tuple[list[float], list[float]]:
        """The weights of the plan's pairs, and of the buffers apart from it; kept for the next call
        with the same function.
        """
        if self._listed is None or self._listed[0] is not weight_of:
            apart = [] if self._apart is None else self._apart.pairs
            each, others = (
                # Pairs that are copied have none.
                [weight_of(pair.name) if pair.averages else 1.0 for pair in pairs]
                for pairs in (self._in_plan, apart)
            )
            self._listed = weight_of, each, others
        return self._listed[1:]

    def _take_snapshot(self) -> None:
        if self._snapshot is not None:
            self.wait_until_read()  # the previous update may still be reading it
            self._snapshot.copy_()

    def mend_(self) -> None:
        """Gives elements of averaged buffers that aren't finite the model's value."""
        if self._apart is not None:
            self._apart.mend_()


def _with_snapshots(pairs: list[Pair], backend: str | None) -> tuple[Plan | None, list[Pair]]:
    """A plan that copies the model's buffers, and the pairs with these copies as sources.

    For updates that run in parallel with training: the next forward pass writes the buffers without
    waiting for the update, which therefore reads copies of them. Sparse buffers are copied into the
    average itself, and the update leaves them alone.
    """
    carried = [pair for pair in pairs if _is_carried(pair)]
    pairs = [pair for pair in pairs if not _is_carried(pair)]
    with torch.inference_mode(False):
        held = {
            id(pair.source): torch.empty_like(pair.source, requires_grad=False)
            for pair in pairs
            if pair.kind is not Kind.PARAMETER
        }
    if not held and not carried:
        return None, pairs
    copied = carried + [
        pair._replace(averaged=held[id(pair.source)], averages=False)
        for pair in pairs
        if id(pair.source) in held
    ]
    from_copies = [pair._replace(source=held.get(id(pair.source), pair.source)) for pair in pairs]
    return plan_of(copied, backend=backend), from_copies


def _is_carried(pair: Pair) -> bool:
    return pair.source.layout != torch.strided and not pair.averages
