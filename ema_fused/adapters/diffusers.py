"""diffusers' ``EMAModel`` with our update."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from torch import nn

from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.ops import update_
from ema_fused.engine.versions import VersionCounters
from ema_fused.frameworks import missing
from ema_fused.modules.exchanging import tell_of_writes

try:
    from diffusers import training_utils as original
except ImportError as error:
    raise missing("diffusers", "diffusers", error) from error

__all__ = ["EMAModel"]


_REQUIRES_GRAD = attrgetter("requires_grad")


class EMAModel(original.EMAModel):  # type: ignore[misc]
    """diffusers' ``EMAModel``: all of ``step`` is one launch per device.

    With ``foreach=True`` the results on equal dtypes are bitwise the original's. Without it, each
    step is within 2 units in the last place of the original, which rounds once more (see
    ``"delta"`` of :class:`~ema_fused.Plan`). ``foreach`` still selects how ``copy_to`` and
    ``restore`` copy; after them autograd and autocast know that the parameters were written, which
    the original hides from them. Parameters that need no gradient are copied, as in the original.
    Dtypes and devices may differ within a pair, and pinned memory is allowed.

    The original's step runs under DeepSpeed's ZeRO-3, where parameters must be gathered first, and
    if a module is passed instead of parameters, which is deprecated.

    Arguments, methods, attributes and ``state_dict`` as diffusers'.

    Raises from ``step``:
        ValueError: the number of parameters isn't that of the averages, or shapes differ.
        TypeError: a parameter can't be averaged (integers).
        If an error is raised, the averages and ``optimization_step`` are unchanged.
    """

    @outside_graphs
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Updates the averages with ``parameters``, a list or an iterator."""
        if isinstance(parameters, nn.Module) or _is_partitioned():
            super().step(parameters)
            return
        source = list(parameters)
        decay = self.get_decay(self.optimization_step + 1)
        trained = list(map(_REQUIRES_GRAD, source))
        update_(
            self.shadow_params,
            source,
            1 - decay,
            arithmetic="delta",
            only_copy=None if all(trained) else [not trains for trains in trained],
        )
        self.optimization_step += 1
        self.cur_decay_value = decay

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copies the averages into ``parameters``."""
        written = list(parameters)
        super().copy_to(written)
        tell_of_writes(VersionCounters(written))

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copies what ``store`` has kept into ``parameters``."""
        written = list(parameters)
        super().restore(written)
        tell_of_writes(VersionCounters(written))


def _is_partitioned() -> bool:
    """Whether ZeRO-3 partitions the parameters; determined as in the original."""
    if not original.is_transformers_available():
        return False
    return bool(original.transformers.integrations.deepspeed.is_deepspeed_zero3_enabled())
