"""The functions on lists inside of compiled graphs, as operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ema_fused

OPERATORS = torch.ops.ema_fused
WAYS: list[dict[str, Any]] = [
    {"backend": "eager"},
    {"backend": "aot_eager"},
    pytest.param({}, marks=pytest.mark.slow),  # inductor: minutes of a C++ compiler
    pytest.param({"mode": "reduce-overhead"}, marks=pytest.mark.slow),
]  # type: ignore[list-item]
WEIGHTS: list[Any] = [
    0.25,
    torch.tensor(0.25),
    [0.25, 0.5],
    [torch.tensor(0.25), torch.tensor(0.5)],
]


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def lists() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    one, other = ([torch.randn(n, 3, generator=generator) for n in (5, 2)] for _ in range(2))
    return one, other


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=["number", "tensor", "numbers", "tensors"])
def test_lerp_is_one_operator_of_a_whole_graph(way: dict[str, Any], weight: Any) -> None:
    compiled = torch.compile(
        lambda averaged, source, weight: ema_fused.lerp_(averaged, source, weight),
        fullgraph=True,
        **way,
    )
    (averaged, source), (expected, _) = lists(), lists()
    for _ in range(3):
        compiled(averaged, source, weight)
        ema_fused.lerp_(expected, source, weight)
    assert all(map(torch.equal, averaged, expected))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("function", [ema_fused.copy_, ema_fused.swap_])
def test_copies_and_swaps_are_operators_too(
    way: dict[str, Any], function: Callable[[list[Tensor], list[Tensor]], None]
) -> None:
    compiled = torch.compile(lambda a, s: function(a, s), fullgraph=True, **way)
    (averaged, source), (expected, expected_source) = lists(), lists()
    compiled(averaged, source)
    function(expected, expected_source)
    assert all(map(torch.equal, averaged + source, expected + expected_source))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_computed_before_and_after_keeps_its_order(way: dict[str, Any]) -> None:
    def step(averaged: list[Tensor], source: list[Tensor]) -> Tensor:
        doubled = [tensor * 2 for tensor in source]
        ema_fused.lerp_(averaged, doubled, 0.5)
        total = sum(tensor.sum() for tensor in averaged)
        ema_fused.swap_(doubled, averaged)
        ema_fused.copy_(averaged, source)
        return total + doubled[0].sum()

    (averaged, source), (expected, _) = lists(), lists()
    compiled = torch.compile(step, fullgraph=True, **way)
    torch.testing.assert_close(compiled(averaged, source), step(expected, source))
    assert all(map(torch.equal, averaged, expected))


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_parameters_that_are_trained_may_be_sources(way: dict[str, Any]) -> None:
    model = nn.Linear(3, 2)
    averaged = [torch.zeros_like(p) for p in model.parameters()]

    def step(inputs: Tensor) -> Tensor:
        loss = model(inputs).sum()
        ema_fused.lerp_(averaged, list(model.parameters()), 0.5)
        return loss

    inputs = torch.ones(1, 3)
    torch.compile(step, fullgraph=True, **way)(inputs).backward()
    assert all(map(torch.equal, averaged, [p.detach() * 0.5 for p in model.parameters()]))
    assert model.bias.grad is not None and torch.equal(model.bias.grad, torch.ones(2))
    assert not any(tensor.requires_grad for tensor in averaged)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_an_error_says_the_same_as_without_a_graph(way: dict[str, Any]) -> None:
    averaged, source = lists()
    before = [tensor.clone() for tensor in averaged]
    compiled = torch.compile(lambda a, s: ema_fused.lerp_(a, s, 0.5), fullgraph=True, **way)
    with pytest.raises(ValueError, match="pair 1"):
        compiled(averaged, [source[0], torch.zeros(7)])
    assert all(map(torch.equal, averaged, before))


@pytest.mark.parametrize(
    ("operator", "weight"),
    [
        (OPERATORS.lerp_.default, (WEIGHTS[0],)),
        (OPERATORS.lerp_.Tensor, (WEIGHTS[1],)),
        (OPERATORS.lerp_.ScalarList, (WEIGHTS[2],)),
        (OPERATORS.lerp_.TensorList, (WEIGHTS[3],)),
        (OPERATORS.copy_.default, ()),
        (OPERATORS.swap_.default, ()),
    ],
    ids=str,
)
def test_torch_finds_nothing_wrong_with_the_operators(operator: Any, weight: Any) -> None:
    found = torch.library.opcheck(operator, (*lists(), *weight))
    assert set(found.values()) == {"SUCCESS"}


def test_eager_calls_do_not_pass_the_dispatcher() -> None:
    averaged, source = lists()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ema_fused.lerp_(averaged, source, 0.5)
        OPERATORS.copy_.default(averaged, source)
    names = [event.key for event in profile.key_averages()]
    assert "ema_fused::copy_" in names
    assert "ema_fused::lerp_" not in names
