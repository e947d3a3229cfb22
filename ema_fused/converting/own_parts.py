"""What our averages keep in a state beside ``steps`` and the averages, and no other package has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ema_fused.converting.average_state import is_tensor

MEAN = "mean"  # the kind of StochasticWeightAverage, as ``averages.kept_kind`` has it

SEED = "rounding_seed"
WINDOW = "window."  # of LatestWeightAverage
INITIAL = "initial."  # of BiasCorrectedEMA

_LEFT_BEHIND = {
    SEED: "the seed of stochastic rounding isn't carried",
    WINDOW: "the checkpoints of LatestWeightAverage, of which the average is the mean",
    INITIAL: "the weights that BiasCorrectedEMA has begun with, by which it corrects the average",
}
PARTS = tuple(_LEFT_BEHIND)
_NAMES = {
    SEED: "rounding_seed",
    WINDOW: "window.* (LatestWeightAverage)",
    INITIAL: "initial.* (BiasCorrectedEMA)",
}


def parts_in(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors of such parts in a state of ours, by their keys."""
    return {
        str(key): value
        for key, value in state.items()
        if (key == SEED or str(key).startswith((WINDOW, INITIAL))) and is_tensor(value)
    }


def names_of(more: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that these keys are of, for a reader."""
    return tuple(_NAMES[part] for part in _present(more))


def notes_of(more: Mapping[str, Any]) -> tuple[str, ...]:
    """What is lost without these keys of a state."""
    return tuple(_LEFT_BEHIND[part] for part in _present(more))


def _present(more: Mapping[str, Any]) -> list[str]:
    return [part for part in PARTS if any(key.startswith(part) for key in more)]
