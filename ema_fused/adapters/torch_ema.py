"""torch-ema's ``ExponentialMovingAverage`` with our update."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.ops import update_
from ema_fused.engine.versions import VersionCounters
from ema_fused.frameworks import missing
from ema_fused.modules.exchanging import tell_of_writes

try:
    from torch_ema import ema as original
except ImportError as error:
    raise missing("torch_ema", "torch_ema", error) from error

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(original.ExponentialMovingAverage):  # type: ignore[misc]
    """torch-ema's average: all of ``update`` is one launch per device.

    An update is within 2 units in the last place of the original's, which rounds once more (see
    ``"delta"`` of :class:`~ema_fused.Plan`). Dtypes and devices may differ within a pair, which is
    computed in the wider of the two dtypes. Integer tensors, on which the original raises, are
    copied.

    After ``copy_to`` and ``restore`` autograd and autocast know that the parameters were written,
    which the original hides from them.

    Arguments, methods, attributes and ``state_dict`` as torch-ema's.

    Raises from ``update``:
        ValueError: the number of parameters isn't that of the averages, or the parameters have been
            garbage-collected; shapes differ.
        If an error is raised, the averages and ``num_updates`` are unchanged.
    """

    num_updates: int | None

    @outside_graphs
    def update(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Updates the averages with ``parameters``; None: with those they were made from."""
        source = self._get_parameters(parameters)
        decay = self.decay
        counted: int | None = self.num_updates
        if counted is not None:
            counted += 1
            decay = min(decay, (1 + counted) / (10 + counted))
        update_(
            self.shadow_params,
            source,
            1.0 - decay,
            arithmetic="delta",
            copy_others=True,
        )
        self.num_updates = counted

    def copy_to(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Copies the averages into ``parameters``; None: into those they were made from."""
        written = list(self._get_parameters(parameters))
        super().copy_to(written)
        tell_of_writes(VersionCounters(written))

    def restore(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Copies what ``store`` has kept into ``parameters``; None: as :meth:`copy_to`."""
        written = list(self._get_parameters(parameters))
        super().restore(written)
        tell_of_writes(VersionCounters(written))
