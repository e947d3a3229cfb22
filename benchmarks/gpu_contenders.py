"""What competes on the GPU, and the check of each result before anything is timed.

A contender is one update, written once for every buffer set: sets take turns from call to call, so
that no buffer is used again before far more than the L2 cache holds has been touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from contenders import WEIGHT, module_of
from shapes import Shape
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ema_fused

OURS = "ema_fused Plan.lerp_"
OUR_MODEL = "ema_fused ExponentialMovingAverage"
FOREACH = "torch._foreach_lerp_"

# Between two uses of a buffer, at least this many times the L2 cache is touched.
_L2_TIMES = 3
# By how much a contender that rounds elsewhere may differ, relatively and absolutely.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Pair:
    """The dtypes of an averaged tensor and its source."""

    name: str
    averaged: torch.dtype
    source: torch.dtype

    def bytes_moved(self, averages: int = 1) -> int:
        """A parameter's floor: each average read and written, the source read once."""
        return 2 * self.averaged.itemsize * averages + self.source.itemsize

    def bytes_held(self, averages: int = 1) -> int:
        """What a parameter's average(s) and source take of memory."""
        return self.averaged.itemsize * averages + self.source.itemsize


FLOAT32 = Pair("float32", torch.float32, torch.float32)
MIXED = Pair("bfloat16 into float32", torch.float32, torch.bfloat16)
BFLOAT16 = Pair("bfloat16", torch.bfloat16, torch.bfloat16)
PAIRS = (FLOAT32, MIXED, BFLOAT16)


@dataclass(frozen=True)
class Buffers:
    """What one call updates: averaged tensors, the source of each, and its weight."""

    averaged: list[Tensor]
    source: list[Tensor]
    weights: list[float]


@dataclass(frozen=True)
class Contender:
    """An update, as one call for each buffer set; ``exact``: equal to foreach's to the bit."""

    name: str
    calls: list[Callable[[], object]]
    buffers: list[Buffers]
    exact: bool = True


@dataclass(frozen=True)
class Group:
    """Contenders that do the same work; the first is ours, and ratios are taken against it."""

    contenders: list[Contender]
    launches: list[int] = field(default_factory=list)  # of one call of ours, a buffer set each


def sets_needed(bytes_a_set: int, l2_bytes: int) -> int:
    """How many buffer sets have to take turns."""
    return max(1, math.ceil(_L2_TIMES * l2_bytes / bytes_a_set))


def rotating(group: Group) -> dict[str, Callable[[], object]]:
    """The contenders as plain calls that go through the buffer sets together.

    Together: were each to keep its own place, one could begin on the set that another just left.
    """
    turn = -1

    def over(calls: list[Callable[[], object]]) -> Callable[[], object]:
        def call() -> None:
            nonlocal turn
            turn = (turn + 1) % len(calls)
            calls[turn]()

        return call

    return {contender.name: over(contender.calls) for contender in group.contenders}


# ---- Groups --------------------------------------------------------------------------------------


def list_group(shapes: list[Shape], pair: Pair, device: torch.device, sets: int) -> Group:
    """Updates of prepared lists, all on the very same tensors."""
    buffers = [_buffers(shapes, pair, device, seed) for seed in range(sets)]
    plans = [_plan(b.averaged, b.source) for b in buffers]
    theirs = _cast_contenders if pair.averaged != pair.source else _torch_contenders
    return Group(
        [
            Contender(OURS, [partial(plan.lerp_, WEIGHT) for plan in plans], buffers),
            *theirs(buffers),
            Contender(
                "loop: mul_().add_()",  # this one takes mixed dtypes as they are
                [partial(_multiply_add_loop, b) for b in buffers],
                buffers,
                exact=False,
            ),
        ],
        [plan.launches for plan in plans],
    )


def _torch_contenders(buffers: list[Buffers]) -> list[Contender]:
    return [
        Contender(FOREACH, [partial(_foreach, b) for b in buffers], buffers),
        Contender("loop: lerp_", [partial(_lerp_loop, b) for b in buffers], buffers, exact=False),
    ]


def _cast_contenders(buffers: list[Buffers]) -> list[Contender]:
    """Torch's lerp takes one dtype: the source is cast, into new memory or into a kept copy."""
    kept = [[torch.empty_like(tensor) for tensor in b.averaged] for b in buffers]
    return [
        Contender(f"float() each, {FOREACH}", [partial(_fresh_cast, b) for b in buffers], buffers),
        Contender(
            f"torch._foreach_copy_ to a kept copy, {FOREACH}",
            [partial(_kept_cast, b, cast) for b, cast in zip(buffers, kept, strict=True)],
            buffers,
        ),
        Contender(
            "loop: lerp_ of float()",
            [partial(_lerp_loop, b) for b in buffers],
            buffers,
            exact=False,
        ),
    ]


def _foreach(b: Buffers) -> None:
    torch._foreach_lerp_(b.averaged, b.source, WEIGHT)


def _fresh_cast(b: Buffers) -> None:
    torch._foreach_lerp_(b.averaged, [tensor.float() for tensor in b.source], WEIGHT)


def _kept_cast(b: Buffers, cast: list[Tensor]) -> None:
    torch._foreach_copy_(cast, b.source)
    torch._foreach_lerp_(b.averaged, cast, WEIGHT)


def _lerp_loop(b: Buffers) -> None:
    for averaged, source in zip(b.averaged, b.source, strict=True):
        averaged.lerp_(source.to(averaged.dtype), WEIGHT)  # to() is nothing on equal dtypes


def _multiply_add_loop(b: Buffers) -> None:
    for averaged, source in zip(b.averaged, b.source, strict=True):
        averaged.mul_(1 - WEIGHT).add_(source, alpha=WEIGHT)


def model_group(shapes: list[Shape], pair: Pair, device: torch.device, sets: int) -> Group:
    """``update_parameters`` of whole averaged models, each with its own averages of the models."""
    models = [module_of(_random(shapes, pair.source, device, seed)) for seed in range(sets)]
    wraps: dict[str, Callable[[nn.Module], Any]] = {
        OUR_MODEL: lambda model: ema_fused.ExponentialMovingAverage(model, momentum=WEIGHT),
        "torch AveragedModel, foreach": lambda model: AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(1 - WEIGHT)
        ),
    }
    return Group([_model_contender(name, wrap, models) for name, wrap in wraps.items()])


def _model_contender(
    name: str, wrap: Callable[[nn.Module], Any], models: list[nn.Module]
) -> Contender:
    calls: list[Callable[[], object]] = []
    buffers = []
    for model in models:
        wrapper = wrap(model)
        wrapper.update_parameters(model)  # the first call copies; from here on it averages
        calls.append(partial(wrapper.update_parameters, model))
        averaged = [parameter.detach() for parameter in wrapper.module.parameters()]
        source = [parameter.detach() for parameter in model.parameters()]
        buffers.append(Buffers(averaged, source, [WEIGHT] * len(source)))
    return Contender(name, calls, buffers)


def averages_group(shapes: list[Shape], count: int, device: torch.device, sets: int) -> Group:
    """``count`` float32 averages of one source: in one pass, and in as many single updates."""
    weights = [
        WEIGHT * (k + 1) for k in range(count)
    ]  # unequal, so that the check tells them apart
    buffers, launches = [], []
    one_pass: list[Callable[[], object]] = []
    singly: list[Callable[[], object]] = []
    for seed in range(sets):
        source = _random(shapes, torch.float32, device, seed)
        lists = [[torch.empty_like(tensor) for tensor in source] for _ in weights]
        plans = [_plan(averaged, source) for averaged in lists]
        together = _plan(lists, source) if count > 1 else plans[0]
        one_pass.append(partial(together.lerp_, weights if count > 1 else weights[0]))
        singly.append(partial(_one_after_another, plans, weights))
        launches.append(together.launches)
        buffers.append(
            Buffers(
                [tensor for averaged in lists for tensor in averaged],
                source * count,
                [weight for weight in weights for _ in source],
            )
        )
    return Group(
        [Contender("one pass", one_pass, buffers), Contender("single updates", singly, buffers)],
        launches,
    )


def _one_after_another(plans: list[ema_fused.Plan], weights: list[float]) -> None:
    for plan, weight in zip(plans, weights, strict=True):
        plan.lerp_(weight)


def _plan(averaged: list[Any], source: list[Tensor]) -> ema_fused.Plan:
    """A plan that runs on our kernel, or an error: anything else would be measured as ours."""
    plan = ema_fused.Plan(averaged, source)
    wanted = (source[0].device.type,)
    if plan.backends != wanted:
        raise RuntimeError(f"planned for the backends {plan.backends}, not {wanted}")
    return plan


def _buffers(shapes: list[Shape], pair: Pair, device: torch.device, seed: int) -> Buffers:
    source = _random(shapes, pair.source, device, seed)
    averaged = [torch.empty_like(tensor, dtype=pair.averaged) for tensor in source]
    return Buffers(averaged, source, [WEIGHT] * len(source))


def _random(
    shapes: list[Shape], dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        for shape in shapes
    ]


# ---- The check -----------------------------------------------------------------------------------


def check(group: Group, seed: int) -> None:
    """Raise unless one update of each contender gives torch's own result, on every buffer set.

    What an average held before is drawn again, tensor by tensor, not kept: the largest models
    leave no room for one more copy.
    """
    for contender in group.contenders:
        for call, buffers in zip(contender.calls, contender.buffers, strict=True):
            generator = torch.Generator(buffers.source[0].device)
            generator.manual_seed(seed)
            for averaged in buffers.averaged:
                averaged.normal_(generator=generator)
            call()
            generator.manual_seed(seed)
            triples = zip(buffers.averaged, buffers.source, buffers.weights, strict=True)
            for index, (found, source, weight) in enumerate(triples):
                expected = torch.empty_like(found).normal_(generator=generator)
                torch._foreach_lerp_([expected], [source.to(found.dtype)], weight)
                if not _agree(found, expected, contender.exact):
                    difference = (found.float() - expected.float()).abs().max().item()
                    raise AssertionError(
                        f"{contender.name} differs from torch at tensor {index} of shape "
                        f"{tuple(found.shape)}, by up to {difference:.3g}"
                    )


def _agree(found: Tensor, expected: Tensor, exact: bool) -> bool:
    if exact:
        bits = _BITS[found.element_size()]
        return torch.equal(found.view(bits), expected.view(bits))
    tolerance = _TOLERANCE[found.dtype]
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
