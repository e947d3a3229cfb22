"""Updates that run beside the training, and everything else that goes on meanwhile."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ema_fused import AveragedWeights, ExponentialMovingAverage, attach
from ema_fused.offloading.staging import Piece
from tests.networks import conv_net, differences, generator, train


class Held:
    """Holds up the thread before it reads the model, and does something there when it goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.action: Callable[[], object] = lambda: None
        stages = Piece.stage

        def stage(piece: Piece) -> None:
            self.reached.set()
            assert self.go_on.wait(30)
            self.action()
            stages(piece)

        monkeypatch.setattr(Piece, "stage", stage)

    def soon(self) -> None:
        threading.Timer(0.1, self.go_on.set).start()


def offloaded(model: nn.Module, **options: Any) -> AveragedWeights:
    averaged = AveragedWeights(model, 0.5, offload="cpu", **options)
    averaged.update_parameters(model, asynchronous=True)
    averaged.flush()
    return averaged


def filled(value: float) -> nn.Module:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.detach().fill_(value)
    return model


def values(averaged: AveragedWeights) -> set[float]:
    return {float(one) for tensor in averaged.weights.values() for one in tensor.flatten()}


@pytest.mark.filterwarnings("ignore:the sources were to be written:ema_fused.SlowPathWarning")
@pytest.mark.parametrize("how", ["swapped", "copy_to", "load_state_dict"])
def test_the_model_is_not_written_while_another_average_reads_it(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filled(0.0)
    other = AveragedWeights(model, 0.5)  # of zeros
    averaged = offloaded(model)
    attachment = attach(torch.optim.SGD(model.parameters(), lr=0.1), model, averaged)
    for parameter in model.parameters():
        parameter.detach().fill_(100.0)
    held = Held(monkeypatch)
    averaged.update_parameters(model, asynchronous=True)
    assert held.reached.wait(30)
    held.soon()
    if how == "swapped":
        with other.swapped(model):
            pass
    elif how == "copy_to":
        other.copy_to(model)
    else:
        model.load_state_dict(filled(7.0).state_dict())
    assert values(averaged) == {50.0}
    attachment.detach()


def test_an_attachment_keeps_nothing_alive() -> None:
    hooks = len(_global_optimizer_pre_hooks)
    model = conv_net()
    averaged = AveragedWeights(model, offload="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, averaged)
    optimizer.step()
    optimizer.step()
    averaged.flush()
    gone = [weakref.ref(one) for one in (model, averaged, optimizer)]
    del model, averaged, optimizer
    gc.collect()
    assert [one() for one in gone] == [None] * 3
    assert len(_global_optimizer_pre_hooks) == hooks


def test_parameters_that_an_optimizer_gets_later_make_it_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, foreign = conv_net(), nn.Linear(2, 2)
    averaged = AveragedWeights(model, offload="cpu")
    waited: list[object] = []
    monkeypatch.setattr(AveragedWeights, "wait_until_read", lambda one: waited.append(one))
    attach(torch.optim.SGD(model.hidden.parameters(), lr=0.1), model, averaged)
    second = torch.optim.SGD(foreign.parameters(), lr=0.1)
    second.step()
    assert waited == []
    second.add_param_group({"params": list(model.head.parameters())})
    second.step()
    assert waited == [averaged]


def test_a_model_that_is_deleted_by_the_thread_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage is collected in any thread; the one that updates can't wait for its own update."""
    model = filled(0.0)
    model.itself = [model]  # a cycle: only the collector frees it
    averaged = offloaded(model)
    for parameter in model.parameters():
        parameter.detach().fill_(100.0)
    held = Held(monkeypatch)
    held.action = gc.collect
    averaged.update_parameters(model, asynchronous=True)
    assert held.reached.wait(30)
    gc.disable()
    try:
        del model
        held.go_on.set()
        assert values(averaged) == {50.0}
    finally:
        gc.enable()


def out_of_memory() -> None:
    raise OSError("no more memory")


def test_a_failure_is_told_although_the_model_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(0.0)
    averaged = offloaded(model)

    held = Held(monkeypatch)
    held.action = out_of_memory
    averaged.update_parameters(model, asynchronous=True)
    assert held.reached.wait(30)
    weight = weakref.ref(model.weight)
    del model
    gc.collect()
    held.go_on.set()
    with pytest.raises(RuntimeError, match="no more memory"):
        averaged.flush()
    gc.collect()
    assert weight() is None
    averaged.flush()


def test_a_failure_does_not_leave_averages_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(0.0)
    other = AveragedWeights(model, 0.5)
    for parameter in model.parameters():
        parameter.detach().fill_(100.0)
    elsewhere = filled(1.0)
    averaged = offloaded(elsewhere)

    held = Held(monkeypatch)
    held.action = out_of_memory
    with pytest.raises(RuntimeError, match="no more memory"), other.swapped(model):
        averaged.update_parameters(elsewhere, asynchronous=True)
        held.go_on.set()
    assert model.weight.eq(100.0).all()
    assert values(other) == {0.0}


def test_parts_of_a_model_that_is_gone_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nn.Sequential(filled(0.0), filled(0.0))
    part = whole[0]
    averaged = offloaded(whole)
    for parameter in whole.parameters():
        parameter.detach().fill_(100.0)
    held = Held(monkeypatch)
    averaged.update_parameters(whole, asynchronous=True)
    assert held.reached.wait(30)
    del whole
    gc.collect()
    held.soon()
    with pytest.warns(match="still reading them"):
        averaged.wait_until_read()
    part.weight.detach().fill_(0.0)
    assert values(averaged) == {50.0}


def test_a_first_copy_that_fails_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(1.0)
    averaged = AveragedWeights(model, 0.5, offload="cpu")
    for parameter in model.parameters():
        parameter.detach().fill_(3.0)
    copies = Piece.copy

    def fails(piece: Piece) -> None:
        raise OSError("no more memory")

    monkeypatch.setattr(Piece, "copy", fails)
    with pytest.raises(RuntimeError, match="no more memory"):
        averaged.update_parameters(model, asynchronous=True)
    assert averaged.steps == 0
    monkeypatch.setattr(Piece, "copy", copies)
    averaged.update_parameters(model, asynchronous=True)
    assert averaged.steps == 1
    assert values(averaged) == {3.0}


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_a_distance_on_its_way_is_not_given_up_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = filled(0.0)
    averaged = offloaded(model, distance_every=1)
    for parameter in model.parameters():
        parameter.detach().fill_(1.0)
    held = Held(monkeypatch)
    averaged.update_parameters(model, asynchronous=True)
    assert averaged.distance is None
    assert averaged._distances.place_for(2, torch.device("cpu")) is None
    held.go_on.set()
    averaged.flush()
    assert averaged.distance == (1, math.sqrt(8))
    averaged.update_parameters(model, asynchronous=True)
    averaged.flush()
    assert averaged.distance == (2, math.sqrt(8) / 2)


@pytest.mark.parametrize("backend", [None, "foreach"])
def test_updates_in_inference_mode(backend: str | None) -> None:
    model = conv_net()
    plain, averaged = (
        AveragedWeights(model, 0.5, offload=offload, backend=backend, distance_every=1)
        for offload in (None, "cpu")
    )
    random = generator()
    for _ in range(3):
        train(model, random)
        with torch.inference_mode():
            plain.update_parameters(model)
            averaged.update_parameters(model, asynchronous=True)
            averaged.flush()
    assert differences(dict(plain.state_dict()), dict(averaged.state_dict())) == []
    assert averaged.distance is not None
    assert plain.distance is not None
    assert averaged.distance.value == pytest.approx(plain.distance.value, rel=1e-9)


# Counts on the device.


@pytest.mark.parametrize("options", [{}, {"capturable": True}])
@pytest.mark.parametrize("kind", [AveragedWeights, ExponentialMovingAverage])
def test_averages_made_on_the_meta_device_count(kind: Any, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = conv_net()
        averaged = kind(model, 0.5, rounding="stochastic", **options)
    model.to_empty(device="cpu")
    for value in (4.0, 8.0):
        for tensor in model.parameters():
            tensor.detach().fill_(value)
        averaged.update_parameters(model)
    assert averaged.steps == 2
    assert all(tensor.eq(6).all() for tensor in averaged.module.parameters())


def test_a_captured_interval_leaves_the_average_alone_between() -> None:
    """Exactly: not by a weight of 0, which makes a NaN of an infinity."""
    model = conv_net(dtype=torch.float64)
    there, here = (
        ExponentialMovingAverage(model, 0.1, interval=3, capturable=on) for on in (True, False)
    )
    random = generator()
    for step in range(9):
        train(model, random)
        if step % 3:
            saved = copy.deepcopy(model.state_dict())
            model.head.weight.detach().fill_(math.inf)
        for averaged in (there, here):
            averaged.update_parameters(model)
        if step % 3:
            model.load_state_dict(saved)
        assert differences(dict(there.state_dict()), dict(here.state_dict())) == []
