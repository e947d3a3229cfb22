"""Averages that are lists in the order of the parameters: torch-ema's, and diffusers' EMAModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ema_fused.converting.average_state import (
    AverageState,
    Built,
    Format,
    Wanted,
    WarmUp,
    count_or_one,
    each_once,
    is_averageable,
    is_tensor,
    listed,
    told,
)

_LIST = "shadow_params"
_DECAY = 0.9999  # that of EMAModel, if none is given


def with_names(state: AverageState, names: Sequence[str]) -> AverageState:
    """A state of a list, with names for its tensors.

    Raises:
        ValueError: there are more or fewer names than tensors.
    """
    assert state.unnamed is not None
    if len(names) != len(state.unnamed):
        raise ValueError(
            f"the list of averages has {len(state.unnamed)} tensors, and {len(names)} parameters "
            f"were named; pass those that the average was made of, in their order: with "
            f"requires_grad alone, if it was so, and tied ones once"
        )
    averaged = dict(zip(names, state.unnamed, strict=True))
    return dataclasses.replace(state, averaged=averaged, unnamed=None, parameters=frozenset(names))


def names_for(state: AverageState, tensors: Mapping[str, Any]) -> list[str]:
    """The names of a list's tensors, from a ``state_dict`` of the model, in its order.

    Raises:
        ValueError: it isn't clear which tensors are meant.
    """
    assert state.unnamed is not None
    likely = [name for name, tensor in each_once(tensors) if is_likely_parameter(name, tensor)]
    shapes = [tuple(tensor.shape) for tensor in state.unnamed]
    if [tuple(tensors[name].shape) for name in likely] != shapes:
        raise ValueError(
            f"the list of averages has {len(shapes)} tensors, and the model that gives the names "
            f"has {len(likely)} parameters, or others in this order: {listed(likely)}. Pass a file "
            f"with one name of a parameter in each line"
        )
    return likely


def is_likely_parameter(name: str, tensor: Any) -> bool:
    """Whether it is a parameter, of a model whose buffers are statistics or integers."""
    return is_averageable(tensor) and not name.endswith(("running_mean", "running_var"))


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_tensor, value))


def as_list(state: AverageState, wanted: Wanted, format: str) -> list[Any]:
    """The averages of the parameters, in the order of the model.

    Raises:
        ValueError: the order isn't known.
    """
    if state.unnamed is not None:
        return list(state.unnamed)
    if wanted.names is not None:
        absent = [name for name in wanted.names if name not in state.averaged]
        if absent:
            raise ValueError(
                f"parameters that were named are not in the average: {listed(absent)}; names as in "
                f"it are expected: {listed(list(state.averaged))}"
            )
        return [state.averaged[name] for name in wanted.names]
    raise ValueError(
        f"{format} has a list in the order of model.parameters(), and a checkpoint doesn't say "
        f"which tensors are parameters; pass their names in order by --names FILE, one in each "
        f"line (names=): those of model.named_parameters()"
    )


def _without_names(state: AverageState) -> list[str]:
    """What a list has no place for."""
    lost = [] if state.unnamed is not None else ["the names of the tensors"]
    buffers = [name for name in state.averaged if not state.is_parameter(name)]
    if buffers:
        lost.append(f"what is no parameter, if it was averaged: {listed(buffers)}")
    if state.raw is not None:
        lost.append("the weights of the model, which stay in the source")
    return lost


# ---- torch-ema -----------------------------------------------------------------------------------


def _read_torch_ema(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    if not _is_list(state.get(_LIST)) or not {"num_updates", "decay"} <= state.keys():
        return None
    updates = state["num_updates"]
    return AverageState(
        "torch-ema",
        {},
        # The copy that its constructor makes is the first update of the others.
        steps=None if updates is None else int(updates) + 1,
        counts_averages=True,
        decay=float(state["decay"]),
        warm_up=WarmUp("none" if updates is None else "ratio"),
        unnamed=tuple(state[_LIST]),
    )


def _build_torch_ema(state: AverageState, wanted: Wanted) -> Built:
    if state.decay is None:
        raise ValueError(
            "torch-ema keeps the decay in its state, and this source has none; pass it by --decay "
            "(decay=): 1 - momentum"
        )
    lost = _without_names(state)
    warm_up = state.warm_up
    updates: int | None = None
    if warm_up is None or warm_up.kind != "none":
        updates = max(0, count_or_one(state, lost) - 1)
    if warm_up is None:
        lost.append(
            "whether the decay warms up isn't in the source: num_updates is kept, and so it is at "
            "most (1 + n) / (10 + n)"
        )
    elif warm_up.kind == "power" or warm_up.after or warm_up.least:
        lost.append(f"the warm-up of the decay ({told(warm_up)}); it is (1 + n) / (10 + n)")
    elif warm_up.kind == "none" and state.steps is not None:
        lost.append(f"the number of updates ({state.steps}), which would make the decay warm up")
    tree = {
        "decay": state.decay,
        "num_updates": updates,
        _LIST: as_list(state, wanted, "torch-ema"),
        "collected_params": None,
    }
    return Built(tree, lost=tuple(lost))


# ---- diffusers -----------------------------------------------------------------------------------

COUNT = "optimization_step"
SETTINGS = (
    "decay",
    "min_decay",
    COUNT,
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)


def read_settings(found: Mapping[Any, Any]) -> dict[str, Any]:
    """Steps, decay and warm-up in the numbers that ``EMAModel`` saves."""
    decay = found.get("decay")
    return {
        "steps": int(found[COUNT]),
        "counts_averages": True,
        "decay": None if decay is None else float(decay),
        "warm_up": WarmUp(
            "power" if found.get("use_ema_warmup") else "ratio",
            after=int(found.get("update_after_step", 0)),
            least=float(found.get("min_decay", 0.0)),
            inv_gamma=float(found.get("inv_gamma", 1.0)),
            power=float(found.get("power", 2 / 3)),
        ),
    }


def settings_of(state: AverageState) -> tuple[dict[str, Any], list[str]]:
    """The numbers that ``EMAModel`` saves, and what was made up for them."""
    lost: list[str] = []
    steps = count_or_one(state, lost)
    decay = state.decay
    if decay is None:
        decay = _DECAY
        lost.append(
            f"the decay isn't in the source: it is diffusers' own, {_DECAY}; --decay (decay=) sets "
            f"it"
        )
    warm_up = state.warm_up
    if warm_up is None:
        warm_up = WarmUp("none")
        lost.append(
            "whether the decay warms up isn't in the source: it doesn't, as min_decay is the decay"
        )
    settings = {
        "decay": decay,
        # EMAModel has no way to say that there is no warm-up; with this it changes nothing.
        "min_decay": decay if warm_up.kind == "none" else warm_up.least,
        COUNT: steps,
        "update_after_step": warm_up.after,
        "use_ema_warmup": warm_up.kind == "power",
        "inv_gamma": warm_up.inv_gamma,
        "power": warm_up.power,
    }
    return settings, lost


def _read_diffusers(state: Mapping[Any, Any], _: Wanted) -> AverageState | None:
    if not _is_list(state.get(_LIST)) or COUNT not in state:
        return None
    return AverageState("diffusers-list", {}, unnamed=tuple(state[_LIST]), **read_settings(state))


def build_list(state: AverageState, wanted: Wanted) -> Built:
    """``EMAModel.state_dict()``."""
    settings, lost = settings_of(state)
    tree = {**settings, _LIST: as_list(state, wanted, "EMAModel.state_dict() of diffusers")}
    return Built(tree, lost=(*lost, *_without_names(state)))


TORCH_EMA = Format(
    "torch-ema",
    "torch-ema's ExponentialMovingAverage",
    "shadow_params, decay and num_updates",
    _read_torch_ema,
    _build_torch_ema,
)
DIFFUSERS_LIST = Format(
    "diffusers-list",
    "the state_dict of diffusers' EMAModel",
    "shadow_params and optimization_step",
    _read_diffusers,
    build_list,
)
