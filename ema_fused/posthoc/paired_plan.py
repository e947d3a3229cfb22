"""One plan for the averages of all widths, and what tells whether it still holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack

from torch import nn

from ema_fused.engine.plan import Plan
from ema_fused.modules.choosing import Buffers
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.following import following_buffers
from ema_fused.modules.module_pairs import pair_up, refuse_untied
from ema_fused.modules.shared_pairs import SharedPairs
from ema_fused.modules.watch import ModuleWatch


class PairedPlan:
    """The plan that updates the averages of every width with a model.

    Buffers that only follow take over the model's shapes, and new ones join them.

    Args:
        averages: a module for each width.
        model: isn't kept alive, but its tensors are.
        update_buffers: which buffers are averaged.
        shares: the parameters that are left out.
        backend: as in :class:`~ema_fused.Plan`.
        when_model_is_gone: called when the model is garbage-collected.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: as ``pair_up``; or tensors that were tied
            aren't any more.
    """

    def __init__(
        self,
        averages: nn.ModuleList,
        model: nn.Module,
        *,
        update_buffers: Buffers,
        shares: FrozenShares,
        backend: str | None,
        when_model_is_gone: Callable[[object], object],
    ) -> None:
        self._averages = averages
        self._update_buffers = update_buffers
        self._shares = shares
        self._backend = backend
        try:
            self._prepare(model)
        except (KeyError, ValueError):
            with ExitStack() as undone_if_it_raises:
                changed = [
                    undone_if_it_raises.enter_context(
                        following_buffers(
                            average, model, update_buffers=update_buffers, shares=shares
                        )
                    )
                    for average in averages
                ]
                if not any(changed):
                    raise
                self._prepare(model)
        self._model = weakref.ref(model, when_model_is_gone)

    def _prepare(self, model: nn.Module) -> None:
        self._watch = ModuleWatch(self._averages, model)
        paired = [
            pair_up(average, model, update_buffers=self._update_buffers, shares=self._shares)
            for average in self._averages
        ]
        pairs = paired[0].updated
        refuse_untied(pairs)
        self.plan = Plan(
            [[pair.averaged for pair in one.updated] for one in paired],
            [pair.source for pair in pairs],
            only_copy=[not pair.averages for pair in pairs],
            backend=self._backend,
            names=[pair.name for pair in pairs],
        )
        left_out = [pair for one in paired for pair in one.shared]
        self._left_out = SharedPairs(left_out, self._shares) if left_out else None

    def holds(self, model: nn.Module) -> bool:
        """Whether it is the plan of this model as it is now."""
        if self._model() is not model or self._watch.changed():
            return False
        return self._left_out is None or self._left_out.hold()
