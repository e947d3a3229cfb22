"""Averages kept in host memory and updated by a thread, in the averaged models."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights, ExponentialMovingAverage, SlowPathWarning, attach
from ema_fused.engine.plan import Plan
from ema_fused.offloading.staging import Piece
from tests.networks import conv_net, differences, generator, run, snapshot, train

KINDS = [AveragedWeights, ExponentialMovingAverage]


def loss_of(model: nn.Module, step: int) -> Tensor:
    images = torch.randn(4, 1, 8, 8, generator=generator(step))
    loss: Tensor = model(images).square().mean()
    return loss


def trained(averaged: Any, model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, averaged):
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_buffers": True},
        {"averaged_dtype": torch.float64},
        {"every": 3},
        {"begin_step": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bits_of_one_that_is_not_offloaded(kind: Any, options: dict[str, Any]) -> None:
    states = []
    for offload in (None, "cpu"):
        model = conv_net()
        averaged = kind(model, 0.1, offload=offload, **options)
        trained(averaged, model, 10)
        states.append(dict(averaged.state_dict()))
    assert differences(*states) == []
    assert states[0]["steps"] == (8 if "begin_step" in options else 10)


def test_sixteen_bits_are_rounded_at_random_by_the_same_numbers() -> None:
    states = []
    for offload in (None, "cpu"):
        model = conv_net(dtype=torch.bfloat16)
        averaged = AveragedWeights(model, 0.01, rounding="stochastic", seed=4, offload=offload)
        random = generator()
        for _ in range(6):
            train(model, random)
            averaged.update_parameters(model, asynchronous=True)
            averaged.wait_until_read()
        states.append(dict(averaged.state_dict()))
    assert differences(*states) == []


class Gate:
    """Holds up the thread before it averages, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        averages = Plan.lerp_

        def held(plan: Plan, *arguments: Any, **options: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.open.wait(30)
            averages(plan, *arguments, **options)

        monkeypatch.setattr(Plan, "lerp_", held)


@pytest.mark.parametrize(
    "read",
    [
        lambda averaged, model: dict(averaged.state_dict()),
        lambda averaged, model: dict(averaged.module.state_dict()),
        lambda averaged, model: averaged.weights,
        lambda averaged, model: dict(copy.deepcopy(averaged).state_dict()),
        lambda averaged, model: dict(averaged.named_parameters()),
        lambda averaged, model: averaged.avg_parameters,
        lambda averaged, model: swapped_in(averaged, model),
        lambda averaged, model: written(averaged, model),
    ],
    ids=[
        "state_dict",
        "module",
        "weights",
        "deepcopy",
        "named_parameters",
        "avg_parameters",
        "swapped",
        "copy_to",
    ],
)
def test_whatever_reads_the_average_waits_for_it(
    read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = conv_net()
    plain, averaged = AveragedWeights(model, 0.5), AveragedWeights(model, 0.5, offload="cpu")
    for one in (plain, averaged):
        one.update_parameters(model, asynchronous=True)
    averaged.flush()
    run(plain, model, 1)
    gate = Gate(monkeypatch)
    averaged.update_parameters(model, asynchronous=True)
    assert gate.reached.wait(30)
    threading.Timer(0.05, gate.open.set).start()
    found = read(averaged, model)
    assert gate.open.is_set(), "it was read before it was updated"
    expected = read(plain, model)
    assert differences(found, expected) == []


def swapped_in(averaged: Any, model: nn.Module) -> dict[str, Tensor]:
    with averaged.swapped(model):
        return snapshot(model)


def written(averaged: Any, model: nn.Module) -> dict[str, Tensor]:
    other = copy.deepcopy(model)
    averaged.copy_to(other)
    return snapshot(other)


def test_the_next_optimizer_step_waits_until_the_model_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any optimizer of the model; others don't."""
    model, other = conv_net(), nn.Linear(2, 2)
    averaged = AveragedWeights(model, 0.5, offload="cpu")
    attached, second, foreign = (
        torch.optim.SGD(parameters, lr=0.1)
        for parameters in (model.parameters(), [model.head.weight], other.parameters())
    )
    waited: list[str] = []
    waits = AveragedWeights.wait_until_read

    def noted(self: AveragedWeights) -> None:
        waited.append("waited")
        waits(self)

    monkeypatch.setattr(AveragedWeights, "wait_until_read", noted)
    attachment = attach(attached, model, averaged)
    for optimizer, expected in ((attached, 1), (second, 2), (foreign, 2)):
        optimizer.step()
        assert len(waited) == expected
    attachment.detach()
    attached.step()
    second.step()
    assert len(waited) == 2


def test_a_model_that_changes_later_does_not_change_the_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = conv_net()
    averaged = AveragedWeights(model, 0.5, offload="cpu")
    averaged.update_parameters(model, asynchronous=True)
    averaged.flush()
    before = {name: tensor.clone() for name, tensor in averaged.weights.items()}
    gate = Gate(monkeypatch)
    gate.open.set()
    averaged.update_parameters(model, asynchronous=True)
    averaged.wait_until_read()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1000.0)
    assert differences(before, averaged.weights) == [], "an average of what came later"


def test_buffers_are_taken_before_the_next_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which writes them, and for which nobody waits."""
    model = conv_net()
    averaged = AveragedWeights(model, 0.5, offload="cpu", update_buffers=True)
    averaged.update_parameters(model, asynchronous=True)
    averaged.flush()
    before = {name: tensor.clone() for name, tensor in averaged.weights.items()}
    begun = threading.Event()
    stages = Piece.stage

    def held(piece: Piece) -> None:
        assert begun.wait(30)
        stages(piece)

    monkeypatch.setattr(Piece, "stage", held)
    averaged.update_parameters(model, asynchronous=True)
    for buffer in model.buffers():
        buffer.fill_(1000)
    begun.set()
    assert differences(before, averaged.weights) == []


def test_it_is_right_and_says_so_once_where_nobody_waits() -> None:
    model = conv_net()
    plain, averaged = AveragedWeights(model, 0.5), AveragedWeights(model, 0.5, offload="cpu")
    random = generator()
    with pytest.warns(SlowPathWarning, match=r"ema_fused.attach\(optimizer, model") as caught:
        for _ in range(4):
            train(model, random)
            plain.update_parameters(model)
            averaged.update_parameters(model)
    assert sum("hides" in str(one.message) for one in caught) == 1
    assert differences(dict(averaged.state_dict()), dict(plain.state_dict())) == []


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_an_error_in_the_thread_surfaces_and_the_average_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = conv_net()
    averaged = AveragedWeights(model, 0.5, offload="cpu")
    averaged.update_parameters(model)
    averages = Plan.lerp_

    def fails(plan: Plan, *arguments: Any, **options: Any) -> None:
        raise OSError("the disk of the host is on fire")

    monkeypatch.setattr(Plan, "lerp_", fails)
    averaged.update_parameters(model, asynchronous=True)
    with pytest.raises(RuntimeError, match=r"offloaded update failed: OSError: the disk"):
        averaged.flush()
    monkeypatch.setattr(Plan, "lerp_", averages)
    averaged.update_parameters(model, asynchronous=True)
    averaged.flush()
    assert averaged.steps == 3


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    model = conv_net()
    averaged = AveragedWeights(model, 0.1, offload="cpu")
    trained(averaged, model, 4)
    state = copy.deepcopy(averaged.state_dict())
    twin = copy.deepcopy(model)
    resumed = AveragedWeights(twin, 0.1, offload="cpu")
    resumed.load_state_dict(state)
    for one, its in ((averaged, model), (resumed, twin)):
        trained(one, its, 3)
    assert differences(dict(averaged.state_dict()), dict(resumed.state_dict())) == []


def test_nothing_is_said_where_the_training_never_waits() -> None:
    model = conv_net()
    averaged = AveragedWeights(model, 0.1, offload="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            averaged.update_parameters(model, asynchronous=True)
            averaged.flush()
            averaged.wait_until_read()


def test_a_deleted_average_ends_its_thread() -> None:
    def threads() -> int:
        return sum("ema_fused" in one.name for one in threading.enumerate())

    before = threads()
    model = conv_net()
    averaged = AveragedWeights(model, 0.1, offload="cpu")
    averaged.update_parameters(model, asynchronous=True)
    averaged.flush()
    assert threads() == before + 1
    del averaged
    for thread in threading.enumerate():
        if "ema_fused" in thread.name:
            thread.join(10)
    assert threads() == before
