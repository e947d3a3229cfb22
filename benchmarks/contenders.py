"""What competes in the update benchmark: the ways to move an averaged copy towards its source.

Four groups. ``lists`` is the update alone, on prepared lists of float32 tensors; ``mixed`` the
same with a bfloat16 source; ``several`` four averages of one source; ``models`` is a whole averaged
model's ``update_parameters``. Within
a group every contender does the same work on the same source, and ours comes first.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ema_fused

WEIGHT = 0.001


def _lerp(averaged: Tensor, source: Tensor) -> Tensor:
    return averaged.lerp(source, WEIGHT)


def _multiply_then_add(averaged: Tensor, source: Tensor) -> Tensor:
    return averaged.mul(1 - WEIGHT).add_(source, alpha=WEIGHT)  # differs in the last bits


def _copy(averaged: Tensor, source: Tensor) -> Tensor:
    return source.clone()


@dataclass(frozen=True)
class Contender:
    """One update, ready to be called again and again, what it writes, and its result."""

    name: str
    update: Callable[[], object]
    averaged: list[Tensor]
    expected: Callable[[Tensor, Tensor], Tensor] = _lerp  # of an averaged tensor and its source


@dataclass(frozen=True)
class Group:
    """Contenders that share a source; the first one is ours, and ratios are taken against it."""

    name: str
    source: list[Tensor]
    contenders: list[Contender]


def groups(shapes: list[tuple[int, ...]], seed: int) -> Iterator[Group]:
    """The groups for these shapes, one after another, so that each frees its memory in time."""
    generator = torch.Generator().manual_seed(seed)
    source = [torch.randn(shape, generator=generator) for shape in shapes]
    yield list_group(source)
    yield mixed_group([tensor.bfloat16() for tensor in source])
    yield several_group(source, 4)
    yield model_group(source)


def list_group(source: list[Tensor]) -> Group:
    """Updates of prepared lists, all on the very same tensors."""
    averaged = [torch.zeros_like(tensor) for tensor in source]
    plan = ema_fused.Plan(averaged, source)
    axpby = ema_fused.Plan(averaged, source, arithmetic="axpby")

    def lerp_loop() -> None:
        for a, s in zip(averaged, source, strict=True):
            a.lerp_(s, WEIGHT)

    def multiply_add_loop() -> None:
        for a, s in zip(averaged, source, strict=True):
            a.mul_(1 - WEIGHT).add_(s, alpha=WEIGHT)

    return Group(
        "lists",
        source,
        [
            Contender("ema_fused Plan.lerp_", lambda: plan.lerp_(WEIGHT), averaged),
            Contender(
                "ema_fused.lerp_, nothing prepared",
                lambda: ema_fused.lerp_(averaged, source, WEIGHT),
                averaged,
            ),
            Contender(
                "ema_fused Plan.lerp_, axpby",
                lambda: axpby.lerp_(WEIGHT),
                averaged,
                _multiply_then_add,
            ),
            Contender(
                "torch._foreach_lerp_",
                lambda: torch._foreach_lerp_(averaged, source, WEIGHT),
                averaged,
            ),
            Contender("loop: lerp_", lerp_loop, averaged),
            Contender("loop: mul_().add_()", multiply_add_loop, averaged, _multiply_then_add),
            Contender(
                "for scale, a mere copy: torch._foreach_copy_",
                lambda: torch._foreach_copy_(averaged, source),
                averaged,
                _copy,
            ),
        ],
    )


def mixed_group(source: list[Tensor]) -> Group:
    """A float32 average of a bfloat16 source, which torch's lerp can't take without a cast."""
    averaged = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in source]
    cast = [torch.empty_like(tensor) for tensor in averaged]
    plan = ema_fused.Plan(averaged, source)

    def cast_then_foreach() -> None:
        torch._foreach_lerp_(averaged, [tensor.float() for tensor in source], WEIGHT)

    def cast_in_place_then_foreach() -> None:
        torch._foreach_copy_(cast, source)
        torch._foreach_lerp_(averaged, cast, WEIGHT)

    def lerp_loop() -> None:
        for a, s in zip(averaged, source, strict=True):
            a.lerp_(s.float(), WEIGHT)

    return Group(
        "mixed",
        source,
        [
            Contender("ema_fused Plan.lerp_", lambda: plan.lerp_(WEIGHT), averaged),
            Contender("float() each, torch._foreach_lerp_", cast_then_foreach, averaged),
            Contender(
                "torch._foreach_copy_ to a kept float32 copy, torch._foreach_lerp_",
                cast_in_place_then_foreach,
                averaged,
            ),
            Contender("loop: lerp_ of float()", lerp_loop, averaged),
        ],
    )


def several_group(source: list[Tensor], count: int) -> Group:
    """``count`` float32 averages of one source: in one pass, or one after the other."""
    averages = [[torch.zeros_like(tensor) for tensor in source] for _ in range(count)]
    together = ema_fused.Plan(averages, source)
    alone = [ema_fused.Plan(averaged, source) for averaged in averages]
    all_averaged = [tensor for averaged in averages for tensor in averaged]

    def one_after_the_other() -> None:
        for plan in alone:
            plan.lerp_(WEIGHT)

    def foreach() -> None:
        for averaged in averages:
            torch._foreach_lerp_(averaged, source, WEIGHT)

    return Group(
        "several",
        source * count,
        [
            Contender(
                f"ema_fused Plan of {count} averages", lambda: together.lerp_(WEIGHT), all_averaged
            ),
            Contender(f"{count} ema_fused Plans", one_after_the_other, all_averaged),
            Contender(f"torch._foreach_lerp_ {count} times", foreach, all_averaged),
        ],
    )


def model_group(source: list[Tensor]) -> Group:
    """``update_parameters`` of whole averaged models, each with its own copy of one model."""
    model = module_of(source)
    wrappers: dict[str, Any] = {
        "ema_fused ExponentialMovingAverage": ema_fused.ExponentialMovingAverage(
            model, momentum=WEIGHT
        ),
        "torch AveragedModel, foreach": AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(1 - WEIGHT)
        ),
    }
    if importlib.util.find_spec("mmengine") is not None:
        mmengine = importlib.import_module("mmengine.model")
        wrappers["mmengine ExponentialMovingAverage"] = mmengine.ExponentialMovingAverage(
            model, momentum=WEIGHT
        )
    return Group("models", source, [_model_contender(*item, model) for item in wrappers.items()])


def _model_contender(name: str, wrapper: Any, model: nn.Module) -> Contender:
    wrapper.update_parameters(model)  # the first call copies; from here on it averages
    averaged = [parameter.detach() for parameter in wrapper.module.parameters()]
    return Contender(name, lambda: wrapper.update_parameters(model), averaged)


def module_of(tensors: list[Tensor]) -> nn.Module:
    """A module with these tensors as parameters, two to a submodule, as weight and bias sit.

    Flat in one module they would be quicker to walk than any real network's.
    """
    pairs = [tensors[i : i + 2] for i in range(0, len(tensors), 2)]
    return nn.ModuleList(nn.ParameterList(pair) for pair in pairs)


def check(group: Group, seed: int) -> None:
    """Raise unless one update of each contender gives torch's own result, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    for contender in group.contenders:
        for averaged in contender.averaged:
            averaged.normal_(generator=generator)
        expected = [
            contender.expected(a, s.to(a.dtype))
            for a, s in zip(contender.averaged, group.source, strict=True)
        ]
        contender.update()
        for index, (found, wanted) in enumerate(zip(contender.averaged, expected, strict=True)):
            if not torch.equal(found.view(torch.int32), wanted.view(torch.int32)):
                difference = (found - wanted).abs().max().item()
                raise AssertionError(
                    f"{group.name}: {contender.name} differs from torch at tensor {index} "
                    f"of shape {tuple(found.shape)}, by up to {difference:.3g}"
                )
