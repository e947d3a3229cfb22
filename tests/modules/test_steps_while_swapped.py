"""While averages are in a model, its optimizers don't step: they would train the averages."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ema_fused import ExponentialMovingAverage


def network() -> nn.Module:
    return nn.Linear(3, 2)


def backward(model: nn.Module) -> None:
    model(torch.ones(1, 3)).sum().backward()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_step_while_swapped_is_refused_and_changes_nothing() -> None:
    model = network()
    optimizer, averaged = sgd(model), ExponentialMovingAverage(model, 0.5)
    elsewhere = network()
    others = sgd(elsewhere)
    averaged.update_parameters(model)
    backward(model)
    backward(elsewhere)
    before = [one.detach().clone() for one in model.parameters()]
    averages = [one.detach().clone() for one in averaged.module.parameters()]
    with averaged.swapped(model):
        with pytest.raises(RuntimeError, match=r"an optimizer's step\(\) was called while"):
            optimizer.step()
        others.step()  # of another model
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, averages, averaged.module.parameters()))
    optimizer.step()
    assert not torch.equal(before[0], next(model.parameters()))
    assert not _global_optimizer_pre_hooks, "it is there only while something is swapped"


def test_a_step_in_another_thread_while_swapped_is_refused() -> None:
    model = network()
    optimizer, averaged = sgd(model), ExponentialMovingAverage(model, 0.5)
    averaged.update_parameters(model)
    backward(model)
    found: list[BaseException] = []
    is_swapped, has_stepped = threading.Event(), threading.Event()

    def trains() -> None:
        is_swapped.wait(60)
        try:
            optimizer.step()
        except RuntimeError as error:
            found.append(error)
        has_stepped.set()

    thread = threading.Thread(target=trains)
    thread.start()
    with averaged.swapped(model):
        is_swapped.set()
        assert has_stepped.wait(60)
    thread.join()
    assert len(found) == 1 and "while averaged weights are swapped in" in str(found[0])


def test_a_compiled_step_is_refused_too_and_not_compiled_again() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = network()
    optimizer, averaged = sgd(model), ExponentialMovingAverage(model, 0.5)
    averaged.update_parameters(model)
    step = torch.compile(optimizer.step, backend="eager")
    backward(model)
    step()
    step()
    before = [one.detach().clone() for one in model.parameters()]
    for _ in range(3):
        with (
            averaged.swapped(model),
            pytest.raises(RuntimeError, match=r"an optimizer's step\(\) was called while"),
        ):
            step()
        assert all(map(torch.equal, before, model.parameters()))
    frames = counters["frames"]["total"]
    step()
    step()
    assert counters["frames"]["total"] == frames
    assert not torch.equal(before[0], next(model.parameters()))
    torch._dynamo.reset()
