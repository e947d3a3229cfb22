"""An average that follows an optimizer: once a real step, never for one that is skipped."""

from __future__ import annotations

import copy
import pickle
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import ema_fused
from ema_fused import ExponentialMovingAverage
from tests import processes
from tests.device import DEVICE, nobody_waits
from tests.networks import conv_net, differences, snapshot

ACCUMULATED = 3


def batch(seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 1, 8, 8, generator=random)
    return images, torch.randint(31, (6,), generator=random)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    images, labels = batch(seed)
    return nn.functional.cross_entropy(model(images), labels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    for micro in range(ACCUMULATED):
        loss_of(model, seed * ACCUMULATED + micro).backward()
    optimizer.step()


def test_each_step_updates_once_however_many_micro_batches_it_has() -> None:
    model = conv_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attached = ExponentialMovingAverage(model, 0.1)
    by_hand = ExponentialMovingAverage(model, 0.1)
    ema_fused.attach(optimizer, model, attached)
    for seed in range(8):
        step(model, optimizer, seed)
        by_hand.update_parameters(model)
    assert attached.steps == 8
    assert differences(snapshot(attached), snapshot(by_hand)) == []


@pytest.mark.parametrize("end", ["detach", "with"])
def test_a_detached_average_stays_as_it_is(end: str) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = ExponentialMovingAverage(model, 0.1)
    if end == "detach":
        attachment = ema_fused.attach(optimizer, model, averaged)
        step(model, optimizer, 0)
        attachment.detach()
        attachment.detach()
    else:
        with ema_fused.attach(optimizer, model, averaged):
            step(model, optimizer, 0)
    step(model, optimizer, 1)
    assert averaged.steps == 1


OPTIMIZERS = {
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "fused-adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


def train_scaled(
    model: nn.Module, optimizer: torch.optim.Optimizer, averaged: Any, overflows: set[int]
) -> list[bool]:
    """Eight steps under a GradScaler; whether each of them moved the model."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    moved = []
    for seed in range(8):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(model, seed))
        loss.backward()
        if seed in overflows:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(torch.inf)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        after = list(model.parameters())
        moved.append(any(not torch.equal(b, a) for b, a in zip(before, after, strict=True)))
    return moved


@pytest.mark.parametrize("overflows", [{0, 3, 4, 7}, set()], ids=["some-overflow", "none"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_that_the_scaler_skips_are_not_counted(kind: str, overflows: set[int]) -> None:
    model = conv_net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    averaged = ExponentialMovingAverage(model, momentum=lambda steps: 1 / (steps + 1))
    by_hand = ExponentialMovingAverage(model, momentum=lambda steps: 1 / (steps + 1))
    update = averaged.update_parameters
    seen: list[dict[str, Tensor]] = []

    def observed(model: nn.Module, **options: Any) -> None:
        seen.append(snapshot(model))
        update(model, **options)

    averaged.update_parameters = observed  # type: ignore[method-assign]
    ema_fused.attach(optimizer, model, averaged)
    moved = train_scaled(model, optimizer, averaged, overflows)
    assert [not m for m in moved] == [seed in overflows for seed in range(8)]
    assert averaged.steps == sum(moved)

    # The fused ones come for the skipped steps too.
    called = 8 if kind != "plain" else sum(moved)
    assert len(seen) == called
    shadow = conv_net()
    for state, counts in zip(seen, moved if called == 8 else [True] * called, strict=True):
        if counts:
            shadow.load_state_dict(state)
            by_hand.update_parameters(shadow)
    assert differences(snapshot(averaged), snapshot(by_hand)) == []


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_averages_of_torch_are_updated_too(kind: str) -> None:
    model = conv_net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    averaged = swa_utils.AveragedModel(model)
    ema_fused.attach(optimizer, model, averaged)
    moved = train_scaled(model, optimizer, averaged, {2, 5})
    assert averaged.n_averaged == sum(moved) == 6


def test_a_flag_in_every_kind_of_call_of_an_average() -> None:
    set_, clear = torch.ones(1), torch.zeros(())
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, interval=2)
    averaged.update_parameters(model, found_inf=set_)
    assert averaged.steps == 0, "the first copy doesn't count"
    for expected, flag in enumerate([clear, set_, clear, set_, clear], start=1):
        with torch.no_grad():
            model.head.weight.add_(1.0)
        before = snapshot(averaged)
        averaged.update_parameters(model, found_inf=flag)
        if flag is set_:
            assert differences(before, snapshot(averaged)) == [], f"call {expected}"
    assert averaged.steps == 3


def test_the_optimizer_is_pickled_copied_and_saved_as_ever() -> None:
    model = conv_net()
    optimizer = torch.optim.Adam(model.parameters())
    averaged = ExponentialMovingAverage(model, 0.1)
    plain = optimizer.state_dict()
    ema_fused.attach(optimizer, model, averaged)
    assert optimizer.state_dict() == plain
    step(model, optimizer, 0)
    again = pickle.loads(pickle.dumps(optimizer))
    copied = copy.deepcopy(optimizer)
    assert again.state_dict().keys() == copied.state_dict().keys() == plain.keys()
    for other in (again, copied):
        other.step()
    assert averaged.steps == 1, "a copy of the optimizer trains other parameters"
    step(model, optimizer, 1)
    assert averaged.steps == 2


def test_wrapped_models_and_parameters_added_later() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.conv.parameters(), lr=0.1)
    averaged = ExponentialMovingAverage(model, 0.5)
    ema_fused.attach(optimizer, nn.DataParallel(model), averaged)
    optimizer.add_param_group({"params": list(model.head.parameters())})
    step(model, optimizer, 0)
    assert averaged.steps == 1
    assert differences(snapshot(averaged.module), snapshot(model)) == []


def test_what_cannot_be_attached_is_refused() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    order = r"The arguments are attach\(optimizer, model, averaged\), in this order"
    attach: Any = ema_fused.attach
    with pytest.raises(TypeError, match=f"the optimizer is a ConvNet.*{order}"):
        attach(model, optimizer, averaged)
    with pytest.raises(TypeError, match=f"the model is a SGD.*{order}"):
        attach(optimizer, optimizer, averaged)
    with pytest.raises(TypeError, match=f"the average is a ConvNet, which has no.*{order}"):
        attach(optimizer, averaged, model)
    with pytest.raises(TypeError, match=r"is a GradScaler.*scaler\.step\(optimizer\)"):
        attach(scaler, model, averaged)
    with pytest.raises(TypeError, match=r"is a StepLR.*pass the optimizer that it holds"):
        attach(scheduler, model, averaged)
    with pytest.raises(TypeError, match="the optimizer is a Conv2d"):
        attach([optimizer, model.conv], model, averaged)
    with pytest.raises(TypeError, match="the optimizer is a Parameter"):
        attach(list(model.parameters()), model, averaged)
    with pytest.raises(TypeError, match="the list of optimizers is empty"):
        attach([], model, averaged)
    with pytest.raises(TypeError, match=r"the model is a dict; a torch\.nn\.Module"):
        attach(optimizer, {}, averaged)
    with pytest.raises(TypeError, match=r"is a Linear, which has no update_parameters"):
        attach(optimizer, model, nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"\(SGD\) has no parameter of the model"):
        attach(optimizer, conv_net(), averaged)
    with pytest.raises(ValueError, match=r"an optimizer is listed twice"):
        attach([optimizer, optimizer], model, averaged)
    step(model, optimizer, 0)
    assert averaged.steps == 0


def test_attached_twice_to_one_optimizer_is_refused() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = ExponentialMovingAverage(model, 0.1)
    attachment = ema_fused.attach(optimizer, model, averaged)
    with pytest.raises(RuntimeError, match=r"attached to this optimizer already.*detach\(\)"):
        ema_fused.attach(optimizer, model, averaged)
    ema_fused.attach(optimizer, model, ExponentialMovingAverage(model, 0.1))
    step(model, optimizer, 0)
    assert averaged.steps == 1
    attachment.detach()
    with ema_fused.attach(optimizer, model, averaged):
        step(model, optimizer, 1)
    assert averaged.steps == 2


def test_an_average_needs_no_more_than_its_method() -> None:
    class Counting:
        __slots__ = ("updates",)  # no weak reference
        __hash__ = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.updates = 0

        def update_parameters(self, model: nn.Module) -> None:
            self.updates += 1

    model, averaged = conv_net(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema_fused.attach(optimizer, model, averaged)
    step(model, optimizer, 0)
    assert averaged.updates == 1


@pytest.mark.slow
def test_a_training_killed_in_the_middle_goes_on_to_the_bit(tmp_path: Path) -> None:
    """On real data, with steps that the GradScaler skips because their gradients overflow."""
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    script = Path(__file__).with_name("attach_run.py")
    processes.run_fork("tests.digits", script, tmp_path / "whole")
    killed = (tmp_path / "killed", "--kill-at", 18)
    processes.run_fork("tests.digits", script, *killed, status=-signal.SIGKILL)
    assert torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["done"] == 16
    processes.run_fork("tests.digits", script, tmp_path / "killed", "--resume")
    whole, resumed = (
        torch.load(tmp_path / which / "checkpoint.pt", weights_only=True)
        for which in ("whole", "killed")
    )
    assert whole["done"] == resumed["done"] == 30
    assert whole["averaged"]["steps"] == 30 - 4, "steps 3, 10, 17 and 24 overflow"
    for part in ("model", "averaged"):
        assert differences(whole[part], resumed[part]) == []
    one, other = (run["optimizer"]["state"][0]["momentum_buffer"] for run in (whole, resumed))
    assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", DEVICE], ids=["count-on-cpu", "count-on-device"])
def test_a_flag_on_the_device_decides_there(device: str) -> None:
    model = conv_net().to(DEVICE)
    averaged = ExponentialMovingAverage(model, momentum=lambda steps: 1 / (steps + 1))
    averaged.steps = averaged.steps.to(device)
    by_hand = ExponentialMovingAverage(model, momentum=lambda steps: 1 / (steps + 1))
    flags = [False, False, True, False, True, True, False]
    on_device = [torch.tensor(float(flag), device=DEVICE) for flag in flags]
    for flag, found_inf in zip(flags, on_device, strict=True):
        with torch.no_grad():
            model.head.weight.add_(0.1)
        first = averaged.steps.item() == 0
        with nullcontext() if first else nobody_waits():
            averaged.update_parameters(model, found_inf=found_inf)
        if not flag:
            by_hand.update_parameters(model)
        assert averaged.state_dict()["steps"] == by_hand.steps
    assert differences(snapshot(averaged.module), snapshot(by_hand.module)) == []
