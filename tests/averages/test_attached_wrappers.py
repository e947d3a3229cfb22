"""Optimizers that wrap others, or whose ``step`` calls no hooks: followed, or told of."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import ExponentialMovingAverage, attach

Parameters = Any


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def backward(model: nn.Module) -> None:
    inputs = torch.linspace(-1, 1, 24).view(6, 4)
    model(inputs).square().mean().backward()


def latest(model: nn.Module) -> ExponentialMovingAverage:
    """An average that is always the weights of its last update."""
    return ExponentialMovingAverage(model, lambda step: 1.0)


def equals(averaged: ExponentialMovingAverage, model: nn.Module) -> bool:
    pairs = zip(averaged.module.parameters(), model.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


class SAM(torch.optim.Optimizer):
    """As most are written: an inner optimizer, and two halves that may be called one by one."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base_optimizer.param_groups

    def each(self) -> list[nn.Parameter]:
        return [one for group in self.param_groups for one in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        for one in self.each():
            self.state[one]["before"] = one.clone()
            one.add_(one.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for one in self.each():
            one.copy_(self.state[one]["before"])
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class PlainSAM:
    """The same without ``torch.optim.Optimizer`` and its groups."""

    def __init__(self, model: nn.Module) -> None:
        self._inner = SAM(model.parameters())

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    def step(self, closure: Callable[[], Any]) -> None:
        self._inner.step(closure)


class Lookahead(torch.optim.Optimizer):
    """Without the base's ``__init__``, as timm's; it writes the weights after the inner step."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self._base_optimizer = inside
        self.param_groups = inside.param_groups
        self.defaults = inside.defaults
        self.state = defaultdict(dict)
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._base_optimizer.step()
        self.calls += 1
        for group in self.param_groups if self.calls % 2 == 0 else []:
            for one in group["params"]:
                slow = self.state[one].setdefault("slow", one.clone())
                one.copy_(slow.lerp_(one, 0.5))


class HookedLookahead(Lookahead):
    """As timm's is: it has the dictionaries of hooks, which nothing calls."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        super().__init__(inside)
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}


class Accumulating(torch.optim.Optimizer):
    """As Accelerate's and opacus': every second step isn't one."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.original_optimizer = inside
        self.calls = 0

    @property
    def param_groups(self) -> Any:
        return self.original_optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.original_optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % 2 == 0:
            self.original_optimizer.step()


def test_both_halves_of_sam_are_one_step() -> None:
    model = network()
    optimizer, averaged = SAM(model.parameters()), latest(model)
    attach(optimizer, model, averaged)
    for count in range(1, 4):
        optimizer.zero_grad()
        backward(model)
        optimizer.first_step()
        assert averaged.steps == count - 1
        backward(model)
        optimizer.second_step()
        assert averaged.steps == count and equals(averaged, model)


@pytest.mark.parametrize("kind", [lambda model: SAM(model.parameters()), PlainSAM])
def test_a_step_of_sam_with_its_closure_is_one_step(kind: Callable[[nn.Module], Any]) -> None:
    model = network()
    optimizer, averaged = kind(model), latest(model)
    attach(optimizer, model, averaged)
    for count in range(1, 4):
        optimizer.zero_grad()
        backward(model)
        optimizer.step(lambda: backward(model))
        assert averaged.steps == count and equals(averaged, model)


def test_a_step_that_raises_is_not_counted_and_the_next_is() -> None:
    model = network()
    optimizer, averaged = SAM(model.parameters()), latest(model)
    attach(optimizer, model, averaged)

    def fails() -> None:
        raise ZeroDivisionError

    for _ in range(2):
        backward(model)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(fails)
        optimizer.step(lambda: backward(model))
    assert averaged.steps == 2 and equals(averaged, model)


@pytest.mark.parametrize("kind", [Lookahead, HookedLookahead])
@pytest.mark.parametrize("scheduled", ["", "before", "after", "before and after"])
def test_lookahead_is_averaged_when_it_has_written_its_weights(
    kind: Callable[[Any], Any], scheduled: str
) -> None:
    model = network()
    optimizer, averaged = kind(sgd(model)), latest(model)
    schedulers = []
    if "before" in scheduled:
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    attachment = attach(optimizer, model, averaged)
    if "after" in scheduled:
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in range(1, 5):
            model.zero_grad()
            backward(model)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            assert averaged.steps == count and equals(averaged, model)
    attachment.detach()
    optimizer.step()
    assert averaged.steps == 4 and optimizer.calls == 5


def test_a_wrapper_is_put_back_as_it_was() -> None:
    model = network()
    optimizer = Lookahead(sgd(model))
    first, second = (attach(optimizer, model, latest(model)) for _ in range(2))
    first.detach()
    second.detach()
    third = attach(optimizer, model, latest(model))
    third.detach()
    backward(model)
    optimizer.step()
    assert optimizer.calls == 1
    alone = Lookahead(sgd(model))
    attach(alone, model, latest(model)).detach()
    assert "step" not in vars(alone)


def test_a_step_that_the_wrapper_leaves_out_is_not_counted() -> None:
    model = network()
    optimizer, averaged = Accumulating(sgd(model)), latest(model)
    attach(optimizer, model, averaged)
    for call in range(6):
        backward(model)
        optimizer.step()
        assert averaged.steps == (call + 1) // 2
    assert equals(averaged, model)


def test_wrappers_of_wrappers_and_several_averages() -> None:
    model = network()
    optimizer = Accumulating(Lookahead(sgd(model)))
    averages = [latest(model) for _ in range(2)]
    for averaged in averages:
        attach(optimizer, model, averaged)
    for _ in range(8):
        backward(model)
        optimizer.step()
    for averaged in averages:
        assert averaged.steps == 4 and equals(averaged, model)
    with pytest.raises(RuntimeError, match="attached to this optimizer already"):
        attach(optimizer.original_optimizer, model, averages[0])


class Passing(Accumulating):
    """Takes a GradScaler's flag for what it wraps, as a fused optimizer does."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not bool(self.found_inf):
            self.original_optimizer.step()


@pytest.mark.parametrize("kind", [SAM, Passing])
def test_a_scaler_that_is_given_the_wrapper(kind: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = SAM(model.parameters()) if kind is SAM else kind(sgd(model))
    averaged = latest(model)
    attach(optimizer, model, averaged)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    closure = [lambda: None] if kind is SAM else []
    for call in range(4):
        optimizer.zero_grad()
        inputs = torch.ones(2, 4) * (torch.inf if call == 2 else 1.0)
        scaler.scale(model(inputs).square().mean()).backward()
        scaler.step(optimizer, *closure)
        scaler.update()
    assert averaged.steps == 3 and equals(averaged, model)


class Plain:
    """Nothing but another name for an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def test_copies_of_a_wrapper_are_not_attached() -> None:
    model = network()
    optimizer, averaged = Plain(sgd(model)), latest(model)
    attach(optimizer, model, averaged)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        parameter = other.param_groups[0]["params"][0]
        parameter.grad = torch.ones_like(parameter)
        before = parameter.detach().clone()
        other.step()
        assert not torch.equal(before, parameter)
        assert equals(averaged, model)
    assert averaged.steps == 0
    backward(model)
    optimizer.step()
    assert averaged.steps == 1


def test_an_inner_optimizer_may_know_its_wrapper() -> None:
    model = network()
    optimizer, averaged = SAM(model.parameters()), latest(model)
    optimizer.base_optimizer.outer = optimizer  # type: ignore[attr-defined]
    attach(optimizer, model, averaged)
    backward(model)
    optimizer.step(lambda: None)
    assert averaged.steps == 1 and equals(averaged, model)


def test_an_optimizer_that_holds_another_for_other_parameters_steps_itself() -> None:
    class Holding(torch.optim.SGD):
        """SGD of the matrices; the vectors have an optimizer of their own inside."""

        def __init__(self, model: nn.Module) -> None:
            matrices = [one for one in model.parameters() if one.ndim == 2]
            super().__init__(matrices, lr=0.1)
            self.vectors = torch.optim.Adam(one for one in model.parameters() if one.ndim == 1)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.vectors.step()
            super().step()

    model = network()
    optimizer, averaged = Holding(model), latest(model)
    attach(optimizer, model, averaged)
    for count in range(1, 4):
        backward(model)
        optimizer.step()
        assert averaged.steps == count and equals(averaged, model)


def test_a_step_that_calls_its_bases_step_is_one_step() -> None:
    class Printing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = network()
    sgd(network())  # from now on SGD's own step calls hooks too
    optimizer, averaged = Printing(model.parameters(), lr=0.1), latest(model)
    attach(optimizer, model, averaged)
    backward(model)
    optimizer.step()
    assert averaged.steps == 1


class Unheard(torch.optim.Optimizer):
    """Steps by another method, which calls nothing."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def apply(self) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                one.sub_(one.grad, alpha=0.1)


def test_weights_that_change_without_a_step_are_told_of_once() -> None:
    model = network()
    optimizer, averaged = Unheard(model.parameters()), latest(model)
    attach(optimizer, model, averaged)
    with pytest.warns(UserWarning, match="changed 3 times.* and Unheard made no step") as caught:
        for _ in range(9):
            backward(model)
            optimizer.apply()
    assert len(caught) == 1
    assert averaged.steps == 0


@pytest.mark.parametrize("accumulated", [1, 4])
def test_nothing_is_told_of_where_steps_come(accumulated: int) -> None:
    model = network()
    optimizer, averaged = sgd(model), latest(model)
    attach(optimizer, model, averaged)
    parameter = next(model.parameters())
    hooks: Any = parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    assert len(hooks) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            for _ in range(accumulated):
                backward(model)
            optimizer.step()
    assert len(hooks) == 0, "it looks until the first step only"


# The packages themselves.


def test_optimizers_that_accelerate_has_prepared() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = network()
    model, optimizer = accelerator.prepare(plain, sgd(plain))
    averaged = latest(model)
    attach(optimizer, model, averaged)
    for batch in range(6):
        with accelerator.accumulate(model):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
        assert averaged.steps == (batch + 1) // 2
    assert equals(averaged, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_accelerates_scaler_skips(fused: bool) -> None:
    optimizers = pytest.importorskip("accelerate.optimizer")
    pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = optimizers.AcceleratedOptimizer(sgd(model, fused=fused), scaler=scaler)
    averaged = latest(model)
    attach(optimizer, model, averaged)
    for call in range(5):
        optimizer.zero_grad()
        inputs = torch.ones(2, 4) * (torch.inf if call in (1, 3) else 1.0)
        scaler.scale(model(inputs).square().mean()).backward()
        optimizer.step()
    assert averaged.state_dict()["steps"] == 3
    pickle.loads(pickle.dumps(optimizer))
    copy.deepcopy(optimizer)


def test_optimizers_that_fabric_has_set_up() -> None:
    fabrics = pytest.importorskip("lightning_fabric")
    fabric = fabrics.Fabric(accelerator="cpu", devices=1)
    plain = network()
    model, optimizer = fabric.setup(plain, sgd(plain))
    averaged = latest(plain)
    attach(optimizer, model, averaged)
    for count in range(1, 4):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        assert averaged.steps == count and equals(averaged, plain)
