"""The cases that need nothing but torch: lists, several averages, whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ema_fused.bench.contenders import (
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
from ema_fused.bench.measuring import Case
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import Clock

_SEVERAL = 4


def torch_cases(shapes: Shapes, dtypes: Sequence[str], clock: Clock) -> Iterator[Case]:
    """Ours beside what torch alone offers, on tensors of these shapes and dtypes."""
    chosen = [DTYPES[name] for name in dtypes]
    for pair in chosen:
        yield _case("lists", "prepared lists", shapes, pair, clock, 1)
    if FLOAT32 in chosen:
        yield _case("several", f"{_SEVERAL} averages", shapes, FLOAT32, clock, _SEVERAL)
    for pair in chosen:
        if pair is not MIXED:  # torch's AveragedModel takes no mixed dtypes
            yield _case("models", "update_parameters", shapes, pair, clock, 2)


def host_cases(lists: Sequence[Shapes], clock: Clock) -> Iterator[Case]:
    """Ours and foreach on tensors so small that the device has next to nothing to do."""
    for shapes in lists:
        make = partial(_ours_and_foreach, shapes, clock.device)
        yield Case("host", "torch", "host time", shapes, FLOAT32, 0, make)


def _ours_and_foreach(shapes: Shapes, device: torch.device) -> Group:
    group = list_group([random_tensors(shapes.shapes, FLOAT32.source, device, seed=0)], FLOAT32)
    return replace(
        group, contenders=[c for c in group.contenders if c.name in (OUR_LISTS, FOREACH)]
    )


def _case(
    kind: str, title: str, shapes: Shapes, dtypes: Dtypes, clock: Clock, averages: int
) -> Case:
    held = shapes.elements * (dtypes.averaged.itemsize * averages + dtypes.source.itemsize)
    sets = sets_needed(held, clock.cache_bytes)
    # Also for the flat buffers of the limit, and a cast copy that is kept and one that isn't.
    temporary = shapes.elements * (dtypes.bytes_moved(averages) + 8)
    make: Callable[[], Group] = partial(_made, kind, shapes, dtypes, clock.device, sets)
    return Case(kind, "torch", title, shapes, dtypes, held * sets + temporary, make)


def _made(kind: str, shapes: Shapes, dtypes: Dtypes, device: torch.device, sets: int) -> Group:
    sources = [random_tensors(shapes.shapes, dtypes.source, device, seed) for seed in range(sets)]
    if kind == "lists":
        return list_group(sources, dtypes)
    if kind == "several":
        return several_group(sources, _SEVERAL)
    return model_group([module_of(source) for source in sources])


def own_model_cases(model: nn.Module, name: str, clock: Clock) -> Iterator[Case]:
    """Ours beside torch's on a model as it is: its floating-point parameters, one case a dtype.

    Raises:
        ValueError: where no parameter is floating-point, or one lies on another device.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if not parameters:
        raise ValueError(f"{name} has no floating-point parameter to average")
    for key, parameter in model.named_parameters():
        if parameter.device.type != clock.device.type:
            raise ValueError(
                f"{name}: {key} is on {parameter.device} and the benchmark runs on "
                f"{clock.device}: let the function move the model, or name the device with --device"
            )
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        tensors = [p.detach() for p in parameters if p.dtype is dtype]
        shapes = Shapes(name, name, [tuple(t.shape) for t in tensors], "the model itself")
        dtypes = Dtypes(str(dtype).removeprefix("torch."), dtype, dtype)
        yield Case("lists", "torch", "prepared lists", shapes, dtypes, 0, _lists(tensors, dtypes))
        if dtype.itemsize == 2:
            wide = Dtypes(f"{dtypes.name} into float32", torch.float32, dtype)
            yield Case("lists", "torch", "prepared lists", shapes, wide, 0, _lists(tensors, wide))
    every = Shapes(name, name, [tuple(p.shape) for p in parameters], "the model itself")
    names = " and ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters))
    dtypes = Dtypes(names, parameters[0].dtype, parameters[0].dtype)
    make = partial(model_group, [model])
    yield Case("models", "torch", "update_parameters", every, dtypes, 0, make)


def _lists(tensors: list[Tensor], dtypes: Dtypes) -> Callable[[], Group]:
    return lambda: list_group([tensors], dtypes)
