"""The contenders, which are ways to update averages, and the check of their results.

A contender is one update, as one call for each buffer set. If caches must be cold, calls rotate
through the sets, so that a buffer is used again only after several times the cache size of other
memory was used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ema_fused
from ema_fused.bench.timing import Call

WEIGHT = 0.001
OURS = "ema_fused"
OUR_LISTS = f"{OURS} Plan.lerp_"
FOREACH = "torch._foreach_lerp_"

# Between two uses of a buffer, at least this many times the cache size is read or written.
_CACHE_TIMES = 3
# Relative and absolute tolerance for a contender that rounds differently.
_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
AVERAGED_DTYPES = tuple(_TOLERANCE)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1_000_003  # number of random values, a prime


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of an averaged tensor and its source."""

    name: str
    averaged: torch.dtype
    source: torch.dtype

    def bytes_held(self, averages: int = 1) -> int:
        """Memory of the average(s) and the source, in bytes per element."""
        return self.averaged.itemsize * averages + self.source.itemsize

    def bytes_moved(self, averages: int = 1) -> int:
        """The least traffic, in bytes per element: averages read and written, source read."""
        return 2 * self.averaged.itemsize * averages + self.source.itemsize


FLOAT32 = Dtypes("float32", torch.float32, torch.float32)
MIXED = Dtypes("bfloat16 into float32", torch.float32, torch.bfloat16)
BFLOAT16 = Dtypes("bfloat16", torch.bfloat16, torch.bfloat16)
DTYPES = {"float32": FLOAT32, "mixed": MIXED, "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class Buffers:
    """The tensors of one call: averaged tensors, and the source and weight of each."""

    averaged: list[Tensor]
    source: list[Tensor]
    weights: list[float]


@dataclass(frozen=True)
class Contender:
    """An update, as one call per buffer set; ``exact``: bitwise equal to foreach's."""

    name: str
    calls: list[Call]
    buffers: list[Buffers] = field(default_factory=list)
    exact: bool = True


@dataclass(frozen=True)
class Group:
    """Contenders that do the same work; the first is ours, and ratios are taken against it.

    Attributes:
        contenders: the contenders.
        bytes_moved: bytes that one call must move at least.
        check: raises AssertionError unless the result of every contender is right.
        launches: kernel launches of one call of ours, for each buffer set.
        limit: on the CPU, the same traffic over one flat buffer, if it has been made already.
        close: called when the group isn't used any more.
    """

    contenders: list[Contender]
    bytes_moved: int
    check: Callable[[], None]
    launches: list[int] = field(default_factory=list)
    limit: Call | None = None
    close: Call = lambda: None


def sets_needed(bytes_a_set: int, cache_bytes: int) -> int:
    """How many buffer sets have to take turns."""
    return max(1, math.ceil(_CACHE_TIMES * cache_bytes / max(bytes_a_set, 1)))


def rotating(contenders: Sequence[Contender]) -> dict[str, Call]:
    """The contenders as functions that rotate through the buffer sets with a common index.

    With an index of its own, a contender could use the set that another one has just used.
    """
    turn = -1

    def over(calls: list[Call]) -> Call:
        if len(calls) == 1:
            return calls[0]

        def call() -> None:
            nonlocal turn
            turn = (turn + 1) % len(calls)
            calls[turn]()

        return call

    return {contender.name: over(contender.calls) for contender in contenders}


# ---- Groups --------------------------------------------------------------------------------------


def list_group(sources: list[list[Tensor]], dtypes: Dtypes) -> Group:
    """Updates of prepared lists, all on the same tensors; one list of sources per buffer set."""
    buffers = [
        Buffers(
            [torch.zeros_like(tensor, dtype=dtypes.averaged) for tensor in source],
            source,
            [WEIGHT] * len(source),
        )
        for source in sources
    ]
    plans = [plan_of(b.averaged, b.source) for b in buffers]
    theirs = _with_casts if dtypes.averaged != dtypes.source else _on_equal_dtypes
    contenders = [
        Contender(OUR_LISTS, [partial(plan.lerp_, WEIGHT) for plan in plans], buffers),
        Contender(
            f"{OURS}.lerp_, its plan found again",
            [partial(ema_fused.lerp_, b.averaged, b.source, WEIGHT) for b in buffers],
            buffers,
        ),
        *theirs(buffers),
        Contender(
            "loop: mul_().add_()",  # works on mixed dtypes without a cast
            [partial(multiply_add_loop, b) for b in buffers],
            buffers,
            exact=False,
        ),
    ]
    return _group(contenders, _elements(sources[0]) * dtypes.bytes_moved(), plans)


def _on_equal_dtypes(buffers: list[Buffers]) -> list[Contender]:
    return [
        Contender(FOREACH, [partial(foreach, b) for b in buffers], buffers),
        Contender("loop: lerp_", [partial(lerp_loop, b) for b in buffers], buffers, exact=False),
    ]


def _with_casts(buffers: list[Buffers]) -> list[Contender]:
    """torch's lerp takes one dtype: the source is cast, into new memory or into a kept copy."""
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
            [partial(_cast_loop, b) for b in buffers],
            buffers,
            exact=False,
        ),
    ]


def foreach(b: Buffers) -> None:
    """The update that ours is compared with."""
    torch._foreach_lerp_(b.averaged, b.source, WEIGHT)


def _fresh_cast(b: Buffers) -> None:
    torch._foreach_lerp_(b.averaged, [tensor.float() for tensor in b.source], WEIGHT)


def _kept_cast(b: Buffers, cast: list[Tensor]) -> None:
    torch._foreach_copy_(cast, b.source)
    torch._foreach_lerp_(b.averaged, cast, WEIGHT)


def lerp_loop(b: Buffers) -> None:
    """One call per tensor."""
    for averaged, source in zip(b.averaged, b.source, strict=True):
        averaged.lerp_(source, WEIGHT)


def _cast_loop(b: Buffers) -> None:
    for averaged, source in zip(b.averaged, b.source, strict=True):
        averaged.lerp_(source.float(), WEIGHT)


def multiply_add_loop(b: Buffers) -> None:
    """Two calls per tensor."""
    for averaged, source in zip(b.averaged, b.source, strict=True):
        averaged.mul_(1 - WEIGHT).add_(source, alpha=WEIGHT)


def several_group(sources: list[list[Tensor]], count: int) -> Group:
    """``count`` float32 averages of one source: in one pass, and in ``count`` single updates."""
    # Different weights, so that the check notices if averages are mixed up.
    weights = [WEIGHT * (k + 1) for k in range(count)]
    buffers, all_plans = [], []
    one_pass: list[Call] = []
    singly: list[Call] = []
    foreachs: list[Call] = []
    for source in sources:
        lists = [[torch.zeros_like(tensor) for tensor in source] for _ in weights]
        plans = [plan_of(averaged, source) for averaged in lists]
        together = plan_of(lists, source)
        one_pass.append(partial(together.lerp_, weights))
        singly.append(partial(_one_after_another, plans, weights))
        foreachs.append(partial(_foreach_after_foreach, lists, source, weights))
        all_plans.append(together)
        buffers.append(
            Buffers(
                [tensor for averaged in lists for tensor in averaged],
                source * count,
                [weight for weight in weights for _ in source],
            )
        )
    contenders = [
        Contender(f"{OURS} Plan of {count} averages", one_pass, buffers),
        Contender(f"{count} {OURS} Plans", singly, buffers),
        Contender(f"{FOREACH} {count} times", foreachs, buffers),
    ]
    return _group(contenders, _elements(sources[0]) * FLOAT32.bytes_moved(count), all_plans)


def _one_after_another(plans: list[ema_fused.Plan], weights: list[float]) -> None:
    for plan, weight in zip(plans, weights, strict=True):
        plan.lerp_(weight)


def _foreach_after_foreach(
    lists: list[list[Tensor]], source: list[Tensor], weights: list[float]
) -> None:
    for averaged, weight in zip(lists, weights, strict=True):
        torch._foreach_lerp_(averaged, source, weight)


def model_group(models: list[nn.Module]) -> Group:
    """``update_parameters`` of whole averaged models, each its own; one model per buffer set."""
    wraps: dict[str, Callable[[nn.Module], Any]] = {
        f"{OURS} ExponentialMovingAverage": lambda model: ema_fused.ExponentialMovingAverage(
            model, momentum=WEIGHT
        ),
        "torch AveragedModel, foreach": lambda model: AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(1 - WEIGHT)
        ),
    }
    contenders = [_model_contender(name, wrap, models) for name, wrap in wraps.items()]
    parameters = list(models[0].parameters())
    bytes_moved = sum(p.numel() * 3 * p.element_size() for p in parameters)
    return _group(contenders, bytes_moved, [])


def _model_contender(
    name: str, wrap: Callable[[nn.Module], Any], models: list[nn.Module]
) -> Contender:
    calls: list[Call] = []
    buffers = []
    for model in models:
        wrapper = wrap(model)
        wrapper.update_parameters(model)  # the first call copies; from here on it averages
        calls.append(partial(wrapper.update_parameters, model))
        averaged = _averaged_parameters(wrapper.module)
        source = _averaged_parameters(model)
        buffers.append(Buffers(averaged, source, [WEIGHT] * len(source)))
    return Contender(name, calls, buffers)


def _averaged_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters whose average is checked: of dtypes that torch's lerp supports."""
    return [p.detach() for p in model.parameters() if p.dtype in AVERAGED_DTYPES]


def module_of(tensors: list[Tensor]) -> nn.Module:
    """A module with these tensors as parameters, two per submodule, like weight and bias.

    In one flat module, iterating over them would be faster than in any real network.
    """
    pairs = [tensors[i : i + 2] for i in range(0, len(tensors), 2)]
    return nn.ModuleList(nn.ParameterList(pair) for pair in pairs)


def _group(contenders: list[Contender], bytes_moved: int, plans: list[ema_fused.Plan]) -> Group:
    return Group(
        contenders, bytes_moved, partial(check, contenders), [plan.launches for plan in plans]
    )


def plan_of(averaged: list[Any], source: list[Tensor]) -> ema_fused.Plan:
    """A plan; raises unless our kernel runs it, as something else would be measured as ours."""
    plan = ema_fused.Plan(averaged, source)
    wanted = (source[0].device.type,)
    if plan.backends != wanted:
        raise RuntimeError(
            f"planned for the backends {plan.backends}, not {wanted}: nothing of ours would be "
            "measured; a SlowPathWarning or python -m ema_fused info says why"
        )
    return plan


def _elements(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def random_tensors(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Tensors of these shapes with normally distributed values.

    They are consecutive windows of one repeated random block, because copying is much faster than
    random numbers. Its length is prime, so that values shifted by a chunk or a tensor differ.
    """
    generator = torch.Generator(device).manual_seed(seed)
    block = torch.empty(_BLOCK, dtype=dtype, device=device).normal_(generator=generator)
    twice = torch.cat([block, block])  # has the block that begins at any of its elements
    start = 0
    tensors = []
    for shape in shapes:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        flat, rolled = tensor.view(-1), twice[start : start + _BLOCK]
        whole, rest = divmod(tensor.numel(), _BLOCK)
        flat[: whole * _BLOCK].view(whole, _BLOCK).copy_(rolled)
        flat[whole * _BLOCK :].copy_(rolled[:rest])
        start = (start + tensor.numel()) % _BLOCK
        tensors.append(tensor)
    return tensors


# ---- The check -----------------------------------------------------------------------------------


def check(contenders: Sequence[Contender]) -> None:
    """Raises unless one update of each contender gives torch's result, on every buffer set.

    The initial averages are computed from the source again, tensor by tensor, instead of being
    kept: the largest models leave no memory for another copy.

    Raises:
        AssertionError: naming the contender, the tensor and the largest difference.
    """
    for contender in contenders:
        for call, buffers in zip(contender.calls, contender.buffers, strict=True):
            for averaged, source in zip(buffers.averaged, buffers.source, strict=True):
                averaged.copy_(_before(source, averaged.dtype))
            call()
            triples = zip(buffers.averaged, buffers.source, buffers.weights, strict=True)
            for index, (found, source, weight) in enumerate(triples):
                expected = _before(source, found.dtype)
                torch._foreach_lerp_([expected], [source.to(found.dtype)], weight)
                expected = expected.to(found.device)  # an average may lie on the host
                if not _agree(found, expected, contender.exact):
                    difference = (found.float() - expected.float()).abs().max().item()
                    raise AssertionError(
                        f"{contender.name} differs from torch at tensor {index} of shape "
                        f"{tuple(found.shape)}, by up to {difference:.3g}"
                    )


def _before(source: Tensor, dtype: torch.dtype) -> Tensor:
    """Values far from the source's, the same at each call."""
    return source.detach().to(dtype, copy=True).mul_(-0.75).add_(0.125)


def _agree(found: Tensor, expected: Tensor, exact: bool) -> bool:
    if exact:
        bits = _BITS[found.element_size()]
        return torch.equal(found.view(bits), expected.view(bits))
    tolerance = _TOLERANCE[found.dtype]
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
