"""What an averaged model makes of a state that isn't quite its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fit_state(
    state_dict: dict[str, Any], prefix: str, *, seed: Tensor | None, calls_per_average: int
) -> None:
    """Changes ``state_dict`` so that an averaged model can load it.

    Stochastic rounding may be switched on and off between runs: a checkpoint written without it has
    no seed, and the present one is kept; without it, a seed in the checkpoint is ignored. A state
    of torch's ``AveragedModel`` counts averages, ``n_averaged``, where ours count calls.

    Args:
        seed: the present seed; None without stochastic rounding.
        calls_per_average: of the model that loads it.
    """
    if seed is not None:
        state_dict.setdefault(f"{prefix}rounding_seed", seed)
    else:
        state_dict.pop(f"{prefix}rounding_seed", None)
    count = state_dict.get(f"{prefix}n_averaged")
    if f"{prefix}steps" not in state_dict and isinstance(count, Tensor):
        del state_dict[f"{prefix}n_averaged"]
        state_dict[f"{prefix}steps"] = count.to(torch.long) * calls_per_average
