"""On a GPU: updates beside the training, on another stream and in a captured step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage, MomentumAnnealingEMA, attach
from ema_fused.averages import schedules
from tests.device import DEVICE, needs, nobody_waits, rather, synchronize
from tests.networks import conv_net, differences

pytestmark = pytest.mark.gpu

WIDTH = rather(512, 24)


def layers() -> nn.Module:
    torch.manual_seed(0)
    parts = [part for _ in range(8) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*parts).to(DEVICE)


def images(step: int) -> torch.Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(step)).to(DEVICE)


def trained(steps: int, *, attached: bool = True, **options: Any) -> dict[str, torch.Tensor]:
    """The state of the average after some steps of training."""
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaged = AveragedWeights(model, 0.1, **options)
    attachment = attach(optimizer, model, averaged) if attached else None
    for step in range(steps):
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()
        if attachment is None:
            averaged.update_parameters(model)
    return {name: tensor.clone() for name, tensor in averaged.state_dict().items()}


def test_an_overlapping_update_gives_the_same_bits() -> None:
    expected = trained(20)
    for _ in range(3):
        assert differences(trained(20, overlap=True), expected) == []


@pytest.mark.filterwarnings("ignore:update_parameters.. waits:ema_fused.SlowPathWarning")
def test_it_is_right_where_nobody_waits() -> None:
    assert differences(trained(20, overlap=True, attached=False), trained(20)) == []


def test_an_overlapping_update_runs_on_a_stream_of_its_own() -> None:
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedWeights(model, 0.1, overlap=True)
    averaged.update_parameters(model, asynchronous=True)
    with attach(optimizer, model, averaged):
        model(images(0)).square().mean().backward()
        needs("streams")
        synchronize()
        torch.cuda._sleep(100_000_000)
        optimizer.step()
        # What comes next on this stream isn't held up by the update, which waits for the step.
        main = torch.cuda.current_stream()
        assert averaged._pairing is not None
        assert averaged._pairing.stream not in (None, main)
        assert averaged._pairing._planned.plan._side_streams.unfinished  # type: ignore[union-attr]
        optimizer.step()
        synchronize()


KINDS: dict[str, Any] = {
    "ema": partial(ExponentialMovingAverage, momentum=0.1),
    "annealing": partial(MomentumAnnealingEMA, gamma=5),
    "schedule": partial(
        ExponentialMovingAverage, momentum=partial(schedules.warmup_power, momentum=0.01)
    ),
    "weights": partial(AveragedWeights, momentum=schedules.mean),
}


def trained_in_a_graph(make: Any, *, captured: bool) -> dict[str, torch.Tensor]:
    """The state of the average after three eager steps and twelve more, replayed or eager."""
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    averaged = make(model, capturable=True)
    batch = images(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)

    needs("streams")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(3):
            batch.copy_(images(number))
            step()
    torch.cuda.current_stream().wait_stream(side)
    again = step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        again = graph.replay
    for number in range(3, 15):
        batch.copy_(images(number))
        again()
    synchronize()
    return {name: tensor.clone() for name, tensor in averaged.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interval", [1, 3])
def test_a_captured_training_step_with_its_update(kind: str, interval: int) -> None:
    make = partial(KINDS[kind], interval=interval)
    states = [trained_in_a_graph(make, captured=captured) for captured in (False, True)]
    assert states[0]["steps"] == states[1]["steps"] == 15
    assert differences(*states) == []


def test_the_first_call_is_not_captured() -> None:
    model = conv_net().to(DEVICE)
    averaged = ExponentialMovingAverage(model, 0.1, capturable=True)
    needs("graphs")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        averaged.update_parameters(model)


@pytest.mark.parametrize("options", [{}, {"overlap": True}])
def test_distances_are_sampled_without_waiting(options: dict[str, Any]) -> None:
    model = layers()
    averaged = AveragedWeights(model, 0.5, distance_every=2, **options)
    asynchronous = bool(options)
    for _ in range(4):
        averaged.update_parameters(model, asynchronous=asynchronous)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    expected = sum(parameter.numel() for parameter in model.parameters()) ** 0.5
    synchronize()
    with nobody_waits():
        for _ in range(2):
            averaged.update_parameters(model, asynchronous=asynchronous)
    synchronize()
    assert averaged.distance is not None
    assert averaged.distance.step == 4
    assert averaged.distance.value == pytest.approx(expected, rel=1e-5)


def test_an_offloaded_average_has_the_same_bits_in_pinned_memory() -> None:
    expected = trained(20)
    found = trained(20, offload="cpu")
    assert differences({k: v.cpu() for k, v in expected.items()}, found) == []
    needs("pinned memory")
    before = torch.cuda.memory_allocated()
    model = layers()
    held = torch.cuda.memory_allocated() - before
    averaged = AveragedWeights(model, 0.1, offload="cpu")
    assert torch.cuda.memory_allocated() - before == held
    assert all(one.is_pinned() for one in averaged.module.parameters())


@pytest.mark.parametrize("options", [{"overlap": True}, {"offload": "cpu"}], ids=str)
def test_buffers_are_those_of_the_update_and_not_of_the_next_forward_pass(
    options: dict[str, Any],
) -> None:
    states = []
    for chosen in ({}, options):
        model = nn.Sequential(layers(), nn.BatchNorm1d(WIDTH).to(DEVICE))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averaged = AveragedWeights(model, 0.1, update_buffers=True, **chosen)
        with attach(optimizer, model, averaged):
            for step in range(20):
                optimizer.zero_grad()
                model(images(step)).square().mean().backward()
                optimizer.step()
        states.append({name: tensor.cpu() for name, tensor in averaged.state_dict().items()})
    assert differences(*states) == []
