"""Averages in training steps under ``torch.compile``: nothing of ours is traced, or compiled again.

The backend is "eager": what it compiles is what every backend does, without the minutes of a C++
compiler.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ema_fused import AveragedWeights, ExponentialMovingAverage, Plan, PowerFunctionEMA, attach
from ema_fused.adapters.swa_utils import AveragedModel
from ema_fused.engine import graphs
from tests.networks import Weight, differences, own, snapshot

# As many as Dynamo follows of one training step without an average, and three.
_MORE_FRAMES = 3
_STEPS = 300

Step = Callable[[], None]


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    # An offloaded average takes its hook on all optimizers with it: not while Dynamo reads them.
    gc.collect()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def momentum(step: int) -> float:
    return 1.0 / (step + 10)


class Training:
    """A small network and its optimizer; each equals every other."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.inputs = torch.randn(6, 4)

    def forward_and_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()

    def step(self) -> None:
        self.forward_and_backward()
        self.optimizer.step()


def without() -> Step:
    return torch.compile(Training().step, backend="eager")


def inside(average: Callable[[nn.Module], Any]) -> tuple[Step, nn.Module, Any]:
    """A compiled step that updates the average inside; the model and its average."""
    training = Training()
    averaged = average(training.model)

    def step() -> None:
        training.step()
        averaged.update_parameters(training.model)

    return torch.compile(step, backend="eager"), training.model, averaged


def attached(average: Callable[[nn.Module], Any]) -> tuple[Step, nn.Module, Any]:
    """The same with an average that hangs on an optimizer whose ``step`` is compiled."""
    training = Training()
    averaged = average(training.model)
    attach(training.optimizer, training.model, averaged)
    compiled = torch.compile(training.optimizer.step, backend="eager")

    def step() -> None:
        training.forward_and_backward()
        compiled()

    return step, training.model, averaged


def ours(model: nn.Module) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(model, momentum, update_buffers=True)


def weights(model: nn.Module) -> AveragedWeights:
    return AveragedWeights(model, momentum)


def capturable(model: nn.Module) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(model, 0.1, capturable=True)


def stochastic(model: nn.Module) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(
        model, 0.1, averaged_dtype=torch.bfloat16, rounding="stochastic"
    )


def offloaded(model: nn.Module) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(model, momentum, offload="cpu")


def adapter(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, use_buffers=True)


_WAYS = [
    pytest.param(where, average, id=f"{where.__name__}-{average.__name__}")
    for where in (inside, attached)
    for average in (ours, weights, capturable, stochastic, offloaded, adapter)
]


def frames_of(step: Step, steps: int = 3) -> int:
    for _ in range(steps):
        step()
    return int(counters["frames"]["total"])


@pytest.mark.parametrize(("where", "average"), _WAYS)
def test_nothing_is_compiled_after_the_second_step(
    where: Callable[[Any], tuple[Step, nn.Module, Any]], average: Callable[[nn.Module], Any]
) -> None:
    with warnings.catch_warnings():
        # Of the offloaded average in a loop of its own: true, and not what is looked at.
        warnings.filterwarnings("ignore", message=r"update_parameters\(\) waits")
        warnings.filterwarnings("ignore", message="the sources were to be written")
        step, model, averaged = where(average)
        eager = average(model)
        compiled_after = []
        for _ in range(_STEPS):
            step()
            eager.update_parameters(model)
            compiled_after.append((counters["frames"]["total"], counters["stats"]["unique_graphs"]))
    assert compiled_after[1] == compiled_after[-1]
    assert differences(snapshot(averaged.module), snapshot(eager.module)) == []


@pytest.mark.parametrize("average", [ours, weights, adapter])
def test_three_more_frames_are_followed_than_without_an_average(
    average: Callable[[nn.Module], Any],
) -> None:
    frames_of(without())  # what torch's own code adds when it is met first
    torch._dynamo.reset()
    counters.clear()
    alone = frames_of(without())
    torch._dynamo.reset()
    counters.clear()
    assert frames_of(inside(average)[0]) <= alone + _MORE_FRAMES


def test_a_schedule_is_not_compiled_by_itself() -> None:
    """It is called from a frame between two graphs, where Dynamo is on the watch."""
    calls = []

    def schedule(step: int) -> float:
        calls.append(torch.compiler.is_compiling())
        return 0.5

    training = Training()
    averaged = ExponentialMovingAverage(training.model, schedule)

    def step() -> None:
        training.step()
        averaged.update_parameters(training.model)

    step = torch.compile(step, backend="eager")
    step()
    before = frames_of(step)
    assert frames_of(step, 20) == before
    assert len(calls) == 23 and not any(calls)


def test_plans_and_exchanges_end_a_graph_and_begin_another() -> None:
    model = nn.Linear(3, 3)
    averaged = ExponentialMovingAverage(model, 0.5)
    power = PowerFunctionEMA(model, sigma_rel=0.1)
    one, other = torch.zeros(4), torch.arange(4.0)
    plan = Plan([one], [other])

    def step(inputs: Tensor) -> Tensor:
        outputs = model(inputs) * 2
        plan.lerp_(0.5)
        plan.swap_()
        plan.copy_()
        averaged.update_parameters(model)
        averaged.copy_from(model)
        averaged.copy_to(model)
        power.update_parameters(model)
        return outputs + 1

    inputs = torch.randn(2, 3)
    expected = model(inputs) * 2 + 1
    compiled = torch.compile(step, backend="eager")
    assert torch.equal(compiled(inputs), expected)
    assert torch.equal(one, other) and torch.equal(one, torch.arange(4.0) * 0.5)
    traced = counters["frames"]["total"]
    compiled(inputs)
    compiled(inputs)
    assert counters["frames"]["total"] == traced
    assert int(averaged.steps) == power.steps == 3


def test_a_swap_around_a_compiled_model_evaluates_the_average() -> None:
    model = nn.Linear(3, 3)
    averaged = ExponentialMovingAverage(copy.deepcopy(model), 0.5)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1)
    compiled = torch.compile(model, backend="eager")
    inputs = torch.randn(2, 3)
    compiled(inputs)
    with averaged.swapped(model):
        evaluated = compiled(inputs)
    assert torch.equal(evaluated, averaged.module(inputs))
    assert not torch.equal(compiled(inputs), evaluated)


def test_names_of_a_compiled_model_where_a_loop_over_names_averages_nothing() -> None:
    model, momentum = Weight(0.0), 0.25
    shadow = own(model)
    averaged = ExponentialMovingAverage(model, momentum)
    averaged.update_parameters(model)
    compiled: Any = torch.compile(model, backend="eager")
    for value in (1.0, 2.0):
        model.set_to(value)
        for name, parameter in compiled.named_parameters():
            if name in shadow:  # _orig_mod.weight isn't
                shadow[name].lerp_(parameter.detach(), momentum)
        averaged.update_parameters(compiled)
    assert shadow["weight"] == 0.0
    assert averaged.module.weight == 0.25 * 0.75 + 2.0 * 0.25


def test_a_torch_without_marks_gets_its_own_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_mark", None)

    @graphs.outside_graphs
    def update(values: list[int]) -> None:
        """Says what it does."""
        values.append(torch.compiler.is_compiling())

    assert update.__doc__ == "Says what it does."
    seen: list[int] = []

    def step(inputs: Tensor) -> Tensor:
        outputs = inputs * 2
        update(seen)
        return outputs + 1

    compiled = torch.compile(step, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert seen == [False]
