"""diffusers' ``EMAModel`` with our update."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ema_fused.engine.ops import update_
from ema_fused.frameworks import missing

try:
    from diffusers import training_utils as original
except ImportError as error:
    raise missing("diffusers", "diffusers", error) from error

__all__ = ["EMAModel"]


class EMAModel(original.EMAModel):  # type: ignore[misc]
    """diffusers' ``EMAModel``: the whole of ``step`` is one launch a device.

    With ``foreach=True`` it gives the original's bits on equal dtypes. Without, it is within 2
    units in the last place of the original at each step, which rounds once more there (see
    ``"delta"`` of :class:`~ema_fused.Plan`). ``foreach`` still says how ``copy_to`` and ``restore``
    go about it. Parameters that need no gradient are copied, as there. Dtypes and devices may
    differ within a pair, pinned memory is fine.

    Under DeepSpeed's ZeRO-3, whose parameters must be gathered first, and for a module in the place
    of its parameters, which is deprecated, the original's step runs.

    Arguments, methods, attributes and ``state_dict`` as diffusers'. All but ``step`` is its own.

    Raises from ``step``:
        ValueError: the parameters are not as many as the averages, or of other shapes.
        TypeError: a parameter and its average have no average (integers).
        The averages and ``optimization_step`` are unchanged then.
    """

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes ``parameters``, a list or an iterator, into the averages."""
        if isinstance(parameters, nn.Module) or _is_partitioned():
            super().step(parameters)
            return
        source = list(parameters)
        decay = self.get_decay(self.optimization_step + 1)
        copied = [not parameter.requires_grad for parameter in source]
        update_(
            self.shadow_params,
            source,
            1 - decay,
            arithmetic="delta",
            only_copy=copied if any(copied) else None,
        )
        self.optimization_step += 1
        self.cur_decay_value = decay


def _is_partitioned() -> bool:
    """Whether each process has but a part of each parameter; asked as the original asks it."""
    if not original.is_transformers_available():
        return False
    return bool(original.transformers.integrations.deepspeed.is_deepspeed_zero3_enabled())
