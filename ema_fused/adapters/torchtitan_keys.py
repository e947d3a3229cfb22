"""Averages of ours under the keys of torchtitan's ``EMA``, and back; torchtitan isn't needed.

torchtitan writes ``state.<name>.ema_params`` for each trained parameter, and for the buffers of its
``buffer_patterns``; nothing else, and no counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.engine.checks import check_integer
from ema_fused.modules.naming import plain_names

__all__ = ["from_torchtitan", "to_torchtitan"]

_BEFORE, _BEHIND = "state.", ".ema_params"
_SHOWN = 6


def to_torchtitan(averaged: AveragedWeights) -> dict[str, Tensor]:
    """The averages under the keys that torchtitan's ``EMA`` of the same model has.

    Averaged parameters, and the buffers of ``update_buffers``; what ``share_frozen`` shares with
    the model isn't averaged and is left out, as torchtitan does. So is what ``include`` and
    ``exclude`` leave out: torchtitan's ``EMA``, which averages all that trains, finds these keys
    missing. The values are the averages
    themselves: ``torch.distributed.checkpoint`` saves them, and loads into them::

        dcp.save({"ema": to_torchtitan(averaged)}, checkpoint_id="run/step-100")

    Args:
        averaged: an average of the model, sharded or not.

    Raises:
        TypeError: ``averaged`` is something else.
    """
    return {f"{_BEFORE}{name}{_BEHIND}": tensor for name, tensor in _averages(averaged).items()}


def from_torchtitan(
    state: Mapping[str, Any], averaged: AveragedWeights, *, steps: int
) -> dict[str, Any]:
    """A state for ``averaged.load_state_dict``, from one that torchtitan's ``EMA`` has saved.

    What torchtitan doesn't average (buffers that are copies, say) is as it is in ``averaged``, and
    ``averaged`` isn't changed. What it averages, and ``include`` and ``exclude`` leave out here, is
    not taken from it::

        state = to_torchtitan(averaged)
        dcp.load({"ema": state}, checkpoint_id="run/step-100")
        averaged.load_state_dict(from_torchtitan(state, averaged, steps=100))

    Args:
        state: what torchtitan's ``EMA`` has saved, by its keys.
        averaged: an average of the same model; with ``share_frozen`` if parameters are frozen.
        steps: how many updates the averages have had, 1 or more: torchtitan derives that from the
            trainer's step and doesn't save it. Momentum schedules go on from there.

    Raises:
        KeyError: averages are missing, or there are averages of unknown tensors.
        TypeError, ValueError: ``steps`` is no integer of 1 or more; ``averaged`` is something else.
    """
    steps = check_integer("steps", steps, least=1)
    names = _averages(averaged)
    values = {
        key.removeprefix(_BEFORE).removesuffix(_BEHIND): value
        for key, value in state.items()
        if key.startswith(_BEFORE) and key.endswith(_BEHIND)
    }
    left_out = plain_names(averaged.left_out_names)
    values = {name: value for name, value in values.items() if name not in left_out}
    absent = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if absent or unknown:
        raise KeyError(
            f"the averages of torchtitan aren't those of this AveragedWeights: missing: "
            f"{_list(absent)}; unknown: {_list(unknown)}. torchtitan averages trained parameters "
            f"and the buffers of its buffer_patterns: make the AveragedWeights of the same model, "
            f"with share_frozen=True and update_buffers= the same patterns"
        )
    found = {f"module.{name}": value for name, value in values.items()}
    return {**averaged.state_dict(), "steps": torch.tensor(steps), **found}


def _averages(averaged: AveragedWeights) -> dict[str, Tensor]:
    """What is averaged, by name."""
    if not isinstance(averaged, AveragedWeights):
        raise TypeError(
            f"averaged is a {type(averaged).__name__}; an ema_fused.AveragedWeights is expected, "
            f"which has the plain model's names"
        )
    shared = averaged.shared_names
    tensors = averaged.avg_parameters
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in shared}


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"
