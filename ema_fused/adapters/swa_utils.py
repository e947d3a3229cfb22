"""``torch.optim.swa_utils`` with our update: ``AveragedModel`` and its averaging functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import swa_utils

from ema_fused.adapters.following import known_integer, pairing_of
from ema_fused.averages.torch_functions import weight_and_arithmetic
from ema_fused.engine.checks import check_fraction
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.ops import update_

__all__ = ["AveragedModel", "get_ema_multi_avg_fn", "get_swa_multi_avg_fn"]

MultiAverage = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAverage:
    """``averaged = decay * averaged + (1 - decay) * current`` for lists of tensors, in one launch.

    A drop-in for torch's function of this name, with bitwise equal results. In addition, dtypes may
    differ within a pair, and integers are copied, while torch's averages and truncates them.

    Args:
        decay: the weight of the average, in [0, 1].

    Raises:
        ValueError: ``decay`` is out of its range.
    """
    decay = check_fraction("decay", decay)

    def ema_update(
        averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        _update(averaged, current, 1 - decay)

    return ema_update


def get_swa_multi_avg_fn() -> MultiAverage:
    """The mean of all values so far, for lists of tensors, in one launch.

    A drop-in for torch's function of this name. If ``num_averaged`` is a tensor, as
    ``AveragedModel`` passes it, the weight is rounded to float32 as in torch; on a GPU the kernel
    reads it. Integers are copied.
    """

    def swa_update(
        averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        _update(averaged, current, 1 / (num_averaged + 1))

    return swa_update


def _update(averaged: Sequence[Tensor], current: Sequence[Tensor], weight: Tensor | float) -> None:
    update_(averaged, current, weight, copy_others=True)
    increment_version(averaged)  # tensors of a module, which can be called


class AveragedModel(swa_utils.AveragedModel):
    """torch's ``AveragedModel``: all of ``update_parameters`` is one launch per device.

    It doesn't synchronise: ``n_averaged`` is counted on the host and written into its buffer.
    Tensors are paired by name, ignoring wrappers; dtypes and devices may differ. Integer buffers
    are copied from the model (torch's averages and truncates them).

    The mean of all values (the default) and the exponential averages of
    :func:`get_ema_multi_avg_fn`, ours or torch's, and torch's ``get_ema_avg_fn`` are updated by a
    plan. With those functions the results are bitwise torch's on equal dtypes (``get_ema_avg_fn``
    with a decay below 0.5: in float64 the last bits may differ); the default is within 2 units in
    the last place of torch's at each call (which divides on a CPU, and on a GPU has its weight in
    float32 whatever the dtype). Any other ``avg_fn`` or ``multi_avg_fn`` runs as in torch.

    Arguments, ``state_dict`` and attributes as torch's.

    Raises from ``update_parameters``:
        KeyError: names don't match.
        ValueError: shapes differ.
        TypeError: one side of a pair is floating-point and the other isn't.
        If an error is raised, the averages are unchanged.
    """

    @outside_graphs
    def update_parameters(self, model: nn.Module) -> None:
        """Updates the average with the current weights of ``model``; the first call copies them."""
        function = self.multi_avg_fn if self.avg_fn is None else self.avg_fn
        weight_at, arithmetic = weight_and_arithmetic(function)
        if weight_at is None:
            super().update_parameters(model)
            return
        pairing = pairing_of(
            self,
            self.module,
            model,
            update_buffers=self.use_buffers,
            # torch averages all of named_buffers(), non-persistent ones included.
            options=lambda: {"arithmetic": arithmetic, "caches_are_buffers": True},
            made_for=arithmetic,
        )
        count = known_integer(self, "n_averaged")
        n_averaged = count.read(self.n_averaged)
        if n_averaged == 0:
            pairing.copy_()
        else:
            pairing.average_(weight_at(n_averaged))
        count.write(self.n_averaged, n_averaged + 1)
