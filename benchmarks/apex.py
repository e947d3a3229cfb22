"""apex's two ways to average, on a GPU: by ``multi_tensor_axpby``, and in its Adam's kernel."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.bench.contenders import (
    FLOAT32,
    FOREACH,
    OUR_LISTS,
    OURS,
    WEIGHT,
    Buffers,
    Contender,
    Group,
    check,
    list_group,
    plan_of,
    random_tensors,
)
from ema_fused.bench.measuring import Case, limit_bytes
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import Clock

MODELS = ("resnet50", "sdxl_unet")
AXPBY, ADAM = "multi_tensor_axpby", "FusedAdamSWA"
OUR_ADAM = f"torch Adam(fused=True), {OURS} Plan.lerp_"
_CHUNK = 65536  # what NVIDIA's own training scripts pass
_NEVER = -1  # neither argument is searched for infinities
# Of an element: parameter, gradient, two moments and the average are read, all but the gradient
# written.
_ADAM_BYTES = 9 * 4
_TOLERANCE = 1e-5


def apex_cases(models: Sequence[Shapes], clock: Clock) -> Iterator[Case]:
    """Two cases for each model, float32.

    Raises:
        ImportError: apex isn't installed, or a part of it.
    """
    axpby = importlib.import_module("amp_C").multi_tensor_axpby
    fused = importlib.import_module("apex.contrib.openfold_triton.fused_adam_swa").FusedAdamSWA
    for shapes in models:
        tensors = partial(random_tensors, shapes.shapes, torch.float32, clock.device)
        for title, bytes_moved, make in (
            (AXPBY, FLOAT32.bytes_moved(), partial(_lists, axpby, tensors)),
            (ADAM, _ADAM_BYTES, partial(_optimizers, fused, tensors)),
        ):
            # Both sides of the second case have parameters, gradients, moments and averages.
            needed = shapes.elements * 2 * 5 * 4 + limit_bytes(shapes.elements * bytes_moved)
            yield Case("apex", "apex", title, shapes, FLOAT32, needed, make)


# ---- Lists ---------------------------------------------------------------------------------------


def _lists(axpby: Any, tensors: Any) -> Group:
    """Ours, foreach and apex's on the same lists."""
    group = list_group([tensors(seed=0)], FLOAT32)
    (buffers,) = group.contenders[0].buffers
    found_inf = torch.zeros(1, dtype=torch.int32, device=buffers.averaged[0].device)
    theirs = partial(
        axpby,
        _CHUNK,
        found_inf,
        [buffers.averaged, buffers.source, buffers.averaged],
        1 - WEIGHT,
        WEIGHT,
        _NEVER,
    )
    contenders = [
        *(c for c in group.contenders if c.name in (OUR_LISTS, FOREACH)),
        Contender(f"apex {AXPBY}", [theirs], [buffers], exact=False),
    ]
    return replace(group, contenders=contenders, check=partial(check, contenders))


# ---- An average in the optimizer's kernel --------------------------------------------------------


def _optimizers(fused: Any, tensors: Any) -> Group:
    """A step of Adam with its average: torch's and ours one after the other, apex's in one."""
    sides = [_parameters(tensors) for _ in range(2)]
    averages = [[torch.zeros_like(p) for p in side] for side in sides]
    adam = torch.optim.Adam(sides[0], fused=True)
    plan = plan_of(averages[0], [p.detach() for p in sides[0]])
    theirs = fused(sides[1], sides[1], averages[1], swa_decay_rate=1 - WEIGHT, lr=1e-3)

    def ours() -> None:
        adam.step()
        plan.lerp_(WEIGHT)

    # Its first step copies, and so does ours.
    adam.step()
    plan.copy_()
    theirs.step()
    contenders = [
        Contender(OUR_ADAM, [ours], [Buffers(averages[0], [], [])]),
        Contender(f"apex {ADAM}", [theirs.step], [Buffers(averages[1], [], [])], exact=False),
    ]
    elements = sum(p.numel() for p in sides[0])
    return Group(
        contenders,
        _ADAM_BYTES * elements,
        partial(_check_alike, contenders, sides, averages),
        [plan.launches],
    )


def _parameters(tensors: Any) -> list[nn.Parameter]:
    parameters = [nn.Parameter(tensor) for tensor in tensors(seed=0)]
    for parameter, gradient in zip(parameters, tensors(seed=1), strict=True):
        parameter.grad = gradient
    return parameters


def _check_alike(
    contenders: Sequence[Contender],
    sides: Sequence[Sequence[Tensor]],
    averages: Sequence[Sequence[Tensor]],
) -> None:
    """Raises unless a step of each leaves like parameters and like averages.

    Raises:
        AssertionError: naming the tensor.
    """
    for contender in contenders:
        contender.calls[0]()
    for what, (ours, theirs) in (("parameter", sides), ("average", averages)):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if not torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE):
                raise AssertionError(
                    f"apex's {what} {index} of shape {tuple(one.shape)} is not what torch's Adam "
                    "and ours make of the same gradients"
                )
