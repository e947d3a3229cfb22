"""States of averages that are modules: ours, mmengine's and torch's, and ema-pytorch's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from ema_fused.converting.average_state import (
    MODULE,
    AverageState,
    Built,
    Format,
    Wanted,
    count_or_one,
    is_tensor,
    note_of_decay,
    number,
    tensors_in,
)
from ema_fused.converting.own_parts import MEAN, parts_in

_ONLINE, _AVERAGED = "online_model.", "ema_model."


def _inside(state: Mapping[Any, Any], count: str, *more: str) -> dict[str, Any] | None:
    """The tensors of ``module.*`` of a state with ``count``, and nothing else but ``more``."""
    own = (count, *more)
    if number(state.get(count)) is None:
        return None
    if any(key not in own and not str(key).startswith(MODULE) for key in state):
        return None
    return tensors_in(state, MODULE) or None


def _read_ours(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    more = parts_in(state)
    inside = _inside(state, "steps", *more)
    if inside is None:
        return None
    versions = getattr(state, "_metadata", None) or getattr(state, "versions", None) or {}
    kind = versions.get("", {}).get("average")
    return AverageState("ema_fused", inside, steps=number(state["steps"]), kind=kind, more=more)


def _build_ours(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    steps = torch.tensor(count_or_one(state, lost))
    tensors = {MODULE + name: tensor for name, tensor in state.averaged.items()}
    tree = OrderedDict({"steps": steps, **tensors, **state.more})
    if state.kind is not None:
        # As ``state_dict()`` keeps it; torch.save does too.
        vars(tree)["_metadata"] = OrderedDict({"": {"average": state.kind}})
    return Built(tree, lost=(*lost, *_without_raw(state)))


def _read_torch(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    inside = _inside(state, "n_averaged")
    if inside is None:
        return None
    steps = number(state["n_averaged"])
    return AverageState("torch", inside, steps=steps, counts_averages=True)


def _build_torch(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    if state.kind != MEAN and state.format not in ("torch", "lightning"):
        lost.append(
            "that it is no mean of all values: AveragedModel goes on as one, unless it gets "
            "multi_avg_fn=get_ema_multi_avg_fn(decay)"
        )
    count = torch.tensor(count_or_one(state, lost))
    tensors = {MODULE + name: tensor for name, tensor in state.averaged.items()}
    return Built({"n_averaged": count, **tensors}, lost=(*lost, *_without_raw(state)))


def _without_raw(state: AverageState) -> list[str]:
    return [] if state.raw is None else ["the weights of the model, which stay in the source"]


def _read_ema_pytorch(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    averaged = tensors_in(state, _AVERAGED)
    if not averaged or not is_tensor(state.get("initted")) or number(state.get("step")) is None:
        return None
    has_begun = bool(number(state["initted"]))
    steps = number(state["step"]) if has_begun else 0
    return AverageState("ema-pytorch", averaged, tensors_in(state, _ONLINE) or None, steps=steps)


def _build_ema_pytorch(state: AverageState, _: Wanted) -> Built:
    lost = note_of_decay(state)
    steps = count_or_one(state, lost)
    lost.append(
        f"ema-pytorch copies the model over the average as long as step ({steps}) is at most "
        f"update_after_step (100 unless it is given), and averages at every update_every-th step "
        f"(10): pass EMA(update_after_step=..., update_every=...) as it was done so far"
    )
    if state.raw is None:
        lost.append(
            "the weights of the model aren't in the source: load it into "
            "EMA(include_online_model=False), or pass them by --raw (raw=)"
        )
    tree: dict[str, Any] = {"initted": torch.tensor(steps > 0), "step": torch.tensor(steps)}
    tree |= {_ONLINE + name: tensor for name, tensor in (state.raw or {}).items()}
    tree |= {_AVERAGED + name: tensor for name, tensor in state.averaged.items()}
    return Built(tree, lost=tuple(lost))


OURS = Format(
    "ema_fused",
    "ema_fused, and mmengine's averaged models",
    "steps and module.* and nothing else",
    _read_ours,
    _build_ours,
    "either",
)
TORCH = Format(
    "torch",
    "torch's AveragedModel",
    "n_averaged and module.* and nothing else",
    _read_torch,
    _build_torch,
)
EMA_PYTORCH = Format(
    "ema-pytorch",
    "ema-pytorch's EMA",
    "initted, step and ema_model.*",
    _read_ema_pytorch,
    _build_ema_pytorch,
)
