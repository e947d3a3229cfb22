"""A state says what kind of average it is of, and a class that reads another kind's says so.

Kept in the metadata that ``state_dict()`` has beside its keys, where modules keep their versions:
the keys stay mmengine's. ``torch.save`` keeps it too. mmengine's checkpoints, safetensors files and
distributed checkpoints don't have it, and nothing is said of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ema_fused.engine.notices import warn

MEAN = "mean"
"""The next weight is 1 / (n + 1): it takes the average for the mean of n values."""
MOMENTUM = "momentum"
"""The next weight is a momentum, whatever the average is of."""

_KEY = "average"


def keep_kind(state_dict: Any, prefix: str, kind: str | None) -> None:
    """Notes ``kind`` in the metadata of a state; None, of which nothing is known, isn't noted."""
    metadata = getattr(state_dict, "_metadata", None)
    if kind is not None and metadata is not None:
        metadata.setdefault(prefix[:-1], {})[_KEY] = kind


def warn_of_another_kind(
    name: str, kind: str | None, local_metadata: dict[str, Any], steps: Tensor, interval: int
) -> None:
    """Warns if the state that was loaded is of another kind than ``kind``.

    Args:
        name: the class that has read it.
        local_metadata: the state's, of the averaged model.
        steps: as loaded; of a state without an average (0 or less) nothing is said.
        interval: steps from one average to the next.
    """
    found = local_metadata.get(_KEY)
    if kind is None or found not in (MEAN, MOMENTUM) or found == kind or int(steps) <= 0:
        return
    values = int(steps) // interval
    if kind == MEAN:
        message = (
            f"the state is of an average by a momentum, and {name} takes it for the mean of "
            f"{values} values: its next average gives the model the weight 1/{values + 1}. Load it "
            f"into the class that saved it, or call averaged.steps.fill_(1) to count it as one "
            f"value"
        )
    else:
        message = (
            f"the state is of a mean of all values, and {name} goes on from it by its momentum, as "
            f"from any one value. Load it into the class that saved it, unless that is meant"
        )
    warn(message)
