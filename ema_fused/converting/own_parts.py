"""What our averages keep in a state beside ``steps`` and the averages, and no other package has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def is_of_a_part(key: object) -> bool:
    """Whether a key of a state of ours is of such a part."""
    return str(key) == SEED or str(key).startswith((WINDOW, INITIAL))


def notes_of(more: Mapping[str, Any]) -> tuple[str, ...]:
    """What is lost without these keys of a state."""
    return tuple(
        note for part, note in _LEFT_BEHIND.items() if any(key.startswith(part) for key in more)
    )
