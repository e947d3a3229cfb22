"""Averaged buffers that hold infinity or NaN: a causal mask of -inf, the range of an observer.

``-inf - -inf`` is NaN, so an average would spoil them. Their finite elements are averaged; the
others take the model's value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.plan import Plan
from ema_fused.modules.module_pairs import Kind, Pair, lists_of


def averaged_buffers(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of buffers among ``pairs`` that are averaged."""
    return [pair for pair in pairs if pair.averages and pair.kind is not Kind.PARAMETER]


@outside_graphs
def those_non_finite(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with an element that isn't finite on either side; waits once for each device."""
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, pair in enumerate(pairs):
        for tensor in (pair.averaged, pair.source):
            if tensor.numel() and not tensor.is_meta:
                by_device.setdefault(tensor.device, []).append((i, tensor.detach()))
    found: set[int] = set()
    for here in by_device.values():
        # The largest magnitude is infinite or NaN if any element is, and no sum overflows.
        largest = [_largest(tensor) for _, tensor in here]
        finite = torch.stack(largest).isfinite().tolist()
        found |= {i for (i, _), is_finite in zip(here, finite, strict=True) if not is_finite}
    return [pairs[i] for i in sorted(found)]


def _largest(tensor: Tensor) -> Tensor:
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no norm
    largest: Tensor = torch.linalg.vector_norm(wide, ord=math.inf)
    return largest.double()


class NonFiniteBuffers:
    """Updates buffers of which some elements may be infinite or NaN.

    Args:
        pairs: the buffers; on any devices. Likewise the attribute.
        arithmetic: of the finite elements, as in :class:`~ema_fused.Plan`; likewise ``rounding``
            and ``backend``.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, arithmetic: str, rounding: str, backend: str | None
    ) -> None:
        self.pairs = list(pairs)
        self._is_random = rounding == "stochastic"
        self._plan = Plan(
            **lists_of(self.pairs), arithmetic=arithmetic, rounding=rounding, backend=backend
        )

    def are_as_planned(self) -> bool:
        """Whether every tensor's dtype and shape are those planned."""
        return self._plan.is_as_planned()

    def copy_(self) -> None:
        """Copies every source into its average."""
        self._plan.copy_()

    def average_(
        self,
        weight: float | Tensor | list[float],
        *,
        seed: int,
        step: int | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """Averages what is finite and copies the rest; if ``found_inf`` is set, does nothing."""
        if self._is_random:
            self._plan.seed = seed
        self._plan.lerp_(weight, found_inf=found_inf, step=step if self._is_random else None)
        self.mend_(found_inf=found_inf)

    @outside_graphs
    @torch.no_grad()
    def mend_(self, *, found_inf: Tensor | None = None) -> None:
        """Gives averages that aren't finite the model's value; call it after they were averaged.

        If either side wasn't finite, the average isn't either.
        """
        for pair in self.pairs:
            averaged = pair.averaged.data
            stays = averaged.isfinite()
            if found_inf is not None:
                stays = stays | found_inf.to(averaged.device).reshape(()).ne(0)
            source = pair.source.data.to(device=averaged.device, dtype=averaged.dtype)
            averaged.copy_(torch.where(stays, averaged, source))
