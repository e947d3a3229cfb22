"""Prepared lists, beside what ``torch.compile`` makes of torch's own ways."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ema_fused.bench.contenders import (
    FLOAT32,
    FOREACH,
    OUR_LISTS,
    WEIGHT,
    Contender,
    Dtypes,
    Group,
    check,
    list_group,
    random_tensors,
)
from ema_fused.bench.measuring import CannotMeasureError, Case, first_line, limit_bytes
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import Clock

MODELS = ("100x1024", "resnet50")
ON_GPU = ("resnet50", "16x16777216")  # too large for its cache, which the lists don't leave cold
MOST_TENSORS = 200  # the time to compile grows with them
_MOST_VERSIONS = 64  # of a compiled function


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile``; nothing is compiled before the first call."""
    return torch.compile(function, dynamic=False, **options)


@contextmanager
def compiling() -> Iterator[None]:
    """Within it torch compiles as the benchmark wants it.

    It starts no worker processes, which would stay and disturb timings; and it compiles a function
    as often as contenders use it, where it would give up after some and run the plain one.
    """
    inductor: Any = importlib.import_module("torch._inductor.config")
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    with inductor.patch(compile_threads=1), dynamo.patch(recompile_limit=_MOST_VERSIONS):
        yield


def compiled_cases(
    models: Sequence[Shapes], dtypes: Sequence[Dtypes], clock: Clock
) -> Iterator[Case]:
    """A case for each model and each pair of dtypes."""
    for shapes in models:
        for pair in dtypes:
            # The tensors; the casts that torch's ways keep or make, until the check is through.
            held = pair.bytes_held() + 3 * pair.averaged.itemsize
            needed = shapes.elements * held + limit_bytes(shapes.elements * pair.bytes_moved())
            make = partial(_made, shapes, pair, clock.device)
            yield Case("compiled", "torch.compile", "torch.compile", shapes, pair, needed, make)


def _made(shapes: Shapes, dtypes: Dtypes, device: torch.device) -> Group:
    """Ours, foreach where it takes the dtypes, and the compiled one.

    Raises:
        CannotMeasureError: there are too many tensors, or compiling fails.
    """
    if len(shapes.shapes) > MOST_TENSORS:
        raise CannotMeasureError(f"more than {MOST_TENSORS} tensors take too long to compile")
    group = list_group([random_tensors(shapes.shapes, dtypes.source, device, seed=0)], dtypes)
    (buffers,) = group.contenders[0].buffers
    update, name = (_foreach, FOREACH) if dtypes == FLOAT32 else (_cast_loop, "lerp_ of float()")
    torch.compiler.reset()  # functions are compiled for a limited number of lists
    call = partial(compiled(update, fullgraph=True), buffers.averaged, buffers.source)
    try:
        with torch.no_grad(), compiling():
            call()
    except Exception as error:
        raise CannotMeasureError(f"torch.compile failed: {first_line(error)}") from error
    contenders = [
        *(c for c in group.contenders if c.name in (OUR_LISTS, FOREACH)),
        Contender(f"torch.compile of {name}", [call], [buffers], exact=False),
    ]
    return replace(group, contenders=contenders, check=partial(check, contenders))


def _foreach(averaged: list[Tensor], source: list[Tensor]) -> None:
    torch._foreach_lerp_(averaged, source, WEIGHT)


def _cast_loop(averaged: list[Tensor], source: list[Tensor]) -> None:
    for average, value in zip(averaged, source, strict=True):
        average.lerp_(value.float(), WEIGHT)
