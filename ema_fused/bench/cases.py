"""The cases that need only torch: lists, several averages, whole models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ema_fused.bench.busy import measure_busy
from ema_fused.bench.contenders import (
    AVERAGED_DTYPES,
    DTYPES,
    FLOAT32,
    FOREACH,
    MIXED,
    OUR_LISTS,
    Dtypes,
    Group,
    list_group,
    model_group,
    module_of,
    random_tensors,
    sets_needed,
    several_group,
)
from ema_fused.bench.measuring import Case, limit_bytes
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import Clock

_SEVERAL = 4
# What is measured on a busy machine: most calls are short, as they are in a training.
BUSY_LISTS = ("100x1024", "600x96", "1000x1024", "161x160000")


def torch_cases(shapes: Shapes, dtypes: Sequence[str], clock: Clock) -> Iterator[Case]:
    """Compares our updates with torch's own, on tensors of these shapes and dtypes.

    Several averages are measured in float32 only; whole models not in mixed dtypes, which torch's
    ``AveragedModel`` doesn't support.
    """
    chosen = [DTYPES[name] for name in dtypes]
    for pair in chosen:
        yield _case("lists", "prepared lists", shapes, pair, clock)
    if FLOAT32 in chosen:
        yield _case("several", f"{_SEVERAL} averages", shapes, FLOAT32, clock, _SEVERAL)
    for pair in chosen:
        if pair is not MIXED:
            yield _case("models", "update_parameters", shapes, pair, clock)


def host_cases(lists: Sequence[Shapes], clock: Clock) -> Iterator[Case]:
    """Compares ours with foreach on tensors so small that only the host's time matters."""
    for shapes in lists:
        make = partial(ours_and_foreach, shapes, clock.device)
        yield Case("host", "torch", "host time", shapes, FLOAT32, 0, make)


def busy_cases(lists: Sequence[Shapes], clock: Clock) -> Iterator[Case]:
    """Compares ours with foreach while another process spins on each core; on the CPU."""
    for shapes in lists:
        make = partial(ours_and_foreach, shapes, clock.device)
        needed = shapes.elements * FLOAT32.bytes_held()
        yield Case("busy", "torch", "all cores taken", shapes, FLOAT32, needed, make, measure_busy)


def ours_and_foreach(shapes: Shapes, device: torch.device) -> Group:
    """Only these two contenders, on prepared float32 lists."""
    group = list_group([random_tensors(shapes.shapes, FLOAT32.source, device, seed=0)], FLOAT32)
    return replace(
        group, contenders=[c for c in group.contenders if c.name in (OUR_LISTS, FOREACH)]
    )


def _case(
    kind: str, title: str, shapes: Shapes, dtypes: Dtypes, clock: Clock, averages: int = 1
) -> Case:
    sets, needed = _memory(kind, shapes.elements, dtypes, clock, averages)

    def make() -> Group:
        sources = [
            random_tensors(shapes.shapes, dtypes.source, clock.device, seed) for seed in range(sets)
        ]
        if kind == "several":
            return several_group(sources, averages)
        if kind == "models":
            return model_group([module_of(source) for source in sources])
        return list_group(sources, dtypes)

    return Case(kind, "torch", title, shapes, dtypes, needed, make)


def _memory(
    kind: str, elements: int, dtypes: Dtypes, clock: Clock, averages: int = 1
) -> tuple[int, int]:
    """How many buffer sets take turns, and the most memory that a case needs, in bytes."""
    copies = 2 if kind == "models" else averages  # ours, and torch's AveragedModel's
    sets = sets_needed(elements * dtypes.bytes_held(copies), clock.cache_bytes)
    needed = elements * dtypes.bytes_held(copies) * sets
    if kind == "lists" and dtypes.averaged != dtypes.source:
        needed += elements * dtypes.averaged.itemsize * (sets + 1)  # kept and temporary casts
    if clock.device.type == "cpu":
        needed += limit_bytes(elements * dtypes.bytes_moved(averages))
    return sets, needed


# ---- A model of one's own ------------------------------------------------------------------------


def own_model_cases(model: nn.Module, name: str, clock: Clock) -> Iterator[Case]:
    """Compares ours with torch's on a given model: a case per dtype, and one for all of it.

    Raises:
        ValueError: no parameter has a dtype that torch's lerp supports, or one is on another
            device.
    """
    averaged = [p for p in model.parameters() if p.dtype in AVERAGED_DTYPES]
    if not averaged:
        raise ValueError(f"{name} has no floating-point parameter to average")
    for key, parameter in model.named_parameters():
        if parameter.device != clock.device:
            raise ValueError(
                f"{name}: {key} is on {parameter.device} and the benchmark runs on "
                f"{clock.device}: let the function move the model, or name the device with --device"
            )
    for dtype in dict.fromkeys(p.dtype for p in averaged):
        tensors = [p.detach() for p in averaged if p.dtype is dtype]
        shapes = Shapes(name, name, [tuple(t.shape) for t in tensors], "the model itself")
        dtypes = Dtypes(_name(dtype), dtype, dtype)
        yield _own_lists(tensors, shapes, dtypes, clock)
        if dtype.itemsize == 2:
            wide = Dtypes(f"{dtypes.name} into float32", torch.float32, dtype)
            yield _own_lists(tensors, shapes, wide, clock)
    every = Shapes(name, name, [tuple(p.shape) for p in averaged], "the model itself")
    names = " and ".join(dict.fromkeys(_name(p.dtype) for p in averaged))
    widest = max((p.dtype for p in averaged), key=lambda dtype: dtype.itemsize)
    dtypes = Dtypes(names, widest, widest)
    sets, needed = _memory("models", every.elements, dtypes, clock)
    yield Case(
        *("models", "torch", "update_parameters", every, dtypes, needed),
        lambda: model_group([model, *(copy.deepcopy(model) for _ in range(sets - 1))]),
    )


def _own_lists(tensors: list[Tensor], shapes: Shapes, dtypes: Dtypes, clock: Clock) -> Case:
    sets, needed = _memory("lists", shapes.elements, dtypes, clock)

    def make() -> Group:
        copies = [[tensor.clone() for tensor in tensors] for _ in range(sets - 1)]
        return list_group([tensors, *copies], dtypes)

    return Case("lists", "torch", "prepared lists", shapes, dtypes, needed, make)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
