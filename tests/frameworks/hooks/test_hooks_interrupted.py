"""Signals that arrive while a hook exchanges weights, at every place of the exchange."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from ema_fused.hooks.registered_averages import RegisteredAverages
from tests.interrupting import Interruption
from tests.networks import differences, snapshot

FUNCTIONS = (
    "undisturbed",
    "certainly",
    "certainly.<locals>.begin",
    "RegisteredAverages.put_in",
    "RegisteredAverages.take_out",
    "RegisteredAverages._run",
    "RegisteredAverages._swap",
    "RegisteredAverages._put_in",
)


def test_registered_averages_are_in_or_out_wherever_a_signal_comes() -> None:
    model = nn.BatchNorm1d(3)
    averages = RegisteredAverages(model, skip_buffers=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    outside = snapshot(model)
    averages.put_in()
    inside = snapshot(model)
    averages.take_out()
    assert differences(snapshot(model), outside) == []
    assert differences(inside, outside) != []

    at, where = 0, ""
    ends: list[bool] = []
    while True:
        was_put_in = []

        def exchange(is_in: list[bool] = was_put_in) -> None:
            averages.put_in()
            signal.getsignal(signal.SIGINT)  # a call, after which signals are looked for
            is_in.append(True)
            averages.take_out()

        interruption = Interruption(at, FUNCTIONS)
        raised = interruption.run(exchange)
        if not interruption.happened:
            break
        where = interruption.where
        assert isinstance(raised, KeyboardInterrupt), where
        is_in = differences(snapshot(model), inside) == []
        assert is_in or differences(snapshot(model), outside) == [], where
        ends.append(is_in)
        if is_in:
            averages.take_out()
        at += 1
    assert raised is None
    assert at > 100
    assert ends.count(True) < ends.count(False)


def test_mmengines_hook_knows_what_is_where_wherever_a_signal_comes() -> None:
    pytest.importorskip("mmengine")
    from ema_fused.hooks.mmengine import EMAHook

    class Runner:
        model = nn.Linear(2, 2)

    model = Runner.model
    hook = EMAHook(momentum=0.5)
    hook.before_run(Runner)
    hook.ema_model.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    outside = snapshot(model)
    functions = ("EMAHook._swap_ema_parameters", "EMAHook._put_in", "EMAHook._take_out")
    functions += ("Exchange.put_in", "Exchange._put", "Exchange.take_out", "Exchange._put_back")
    at = 0
    while True:

        def evaluate() -> None:
            hook.before_val_epoch(Runner)
            hook.after_val_epoch(Runner)

        interruption = Interruption(at, functions)
        raised = interruption.run(evaluate)
        if not interruption.happened:
            break
        assert isinstance(raised, KeyboardInterrupt), interruption.where
        hook.before_train_iter(Runner, 0)
        assert differences(snapshot(model), outside) == [], interruption.where
        at += 1
    assert raised is None
    assert at > 100
