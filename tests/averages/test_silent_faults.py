"""Faults that others have found in their averages: the loop that has them, and ours beside it.

No error and no warning came with any of them. docs/silent_faults.md tells where they were seen.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_fused import (
    AveragedWeights,
    ExponentialMovingAverage,
    PowerFunctionEMA,
    StochasticWeightAverage,
    attach,
)
from tests.networks import Tied, Weight, conv_net, differences, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- Updates that happen too often ----------------------------------------------


def train_in(micro_batches: int, averaged: Any, attached: bool) -> float:
    """Four steps, each of four samples, and what becomes of the weight; all sums are exact."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    average = averaged(model)
    if attached:
        attach(optimizer, model, average)
    for _ in range(4):
        for inputs in torch.ones(4, 1).chunk(micro_batches):
            (-model(inputs).sum() / 4).backward()
            is_last = model.weight.grad == -1.0
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
            if not attached:
                average.update_parameters(model)
    assert model.weight == 4.0
    return float(average.module.weight.item())


def test_micro_batches() -> None:
    """The same training, however many pieces its batches come in, has the same average."""

    def naive(model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def ours(model: nn.Module) -> ExponentialMovingAverage:
        return ExponentialMovingAverage(model, momentum=0.5)

    expected = train_in(1, naive, attached=False)
    assert expected == 3.125
    assert train_in(4, naive, attached=False) > 3.4
    for micro_batches in (1, 2, 4):
        assert train_in(micro_batches, ours, attached=True) == expected


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips(fused: bool) -> None:
    """The weights of before are averaged once more for each of them."""
    model = Weight(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    naive, ours = AveragedModel(model), StochasticWeightAverage(model)
    attach(optimizer, model, ours)
    weights = []
    for step in range(12):
        optimizer.zero_grad()
        scaler.scale(-model.weight).backward()
        if 4 <= step < 10:
            assert model.weight.grad is not None
            model.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        naive.update_parameters(model)
        weights.append(model.weight.item())
    assert weights == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 5, 6]
    assert naive.module.weight.item() == pytest.approx(sum(weights) / 12)
    assert ours.module.weight.item() == pytest.approx(sum(range(1, 7)) / 6)


# ---- Averages of something else ------------------------------------------------------------------


def test_a_momentum_the_wrong_way_round() -> None:
    """0.05 is the weight of the new values to some, and that of the average to others."""
    rate = 0.05
    teacher = AveragedModel(Weight(0.0), multi_avg_fn=get_ema_multi_avg_fn(rate))
    averaged = ExponentialMovingAverage(Weight(0.0), momentum=rate)
    for value in (0.0, 1.0, 1.0):
        for average in (teacher, averaged):
            average.update_parameters(Weight(value))
    assert teacher.module.weight > 0.99  # a copy of the student
    assert averaged.module.weight == pytest.approx(1 - 0.95**2)
    with pytest.warns(UserWarning, match=r"weight of the model's values.* would be momentum=0\.05"):
        ExponentialMovingAverage(Weight(), momentum=1 - rate)
    with pytest.raises(TypeError, match=r"pass momentum=0\.05, the weight of the model's values"):
        ExponentialMovingAverage(Weight(), decay=1 - rate)  # type: ignore[call-arg]


def test_sixteen_bits() -> None:
    model = Weight(1.0).bfloat16()
    naive = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = ExponentialMovingAverage(model, 0.001)
        exact = ExponentialMovingAverage(model, 0.001, averaged_dtype=torch.float32)
        drawn = ExponentialMovingAverage(model, 0.001, rounding="stochastic", seed=0)
        for average in (naive, plain, exact, drawn):
            average.update_parameters(model)
        model.set_to(2.0)
        for _ in range(999):
            for average in (naive, plain, exact, drawn):
                average.update_parameters(model)
    assert naive.module.weight == plain.module.weight == 1.0
    expected = 2.0 - 0.999**999
    assert float(exact.module.weight) == pytest.approx(expected, rel=1e-4)
    assert float(drawn.module.weight) == pytest.approx(expected, abs=0.15)  # one element's noise
    with pytest.warns(UserWarning, match="averages are kept in 16 bits"):
        told = ExponentialMovingAverage(model, 0.001)
        for _ in range(2):
            told.update_parameters(model)


def test_statistics_of_batch_norm() -> None:
    """A copy whose parameters are averaged, and whose buffers nobody thinks of."""
    model = nn.BatchNorm1d(1)
    naive = copy.deepcopy(model)
    copied = ExponentialMovingAverage(model, 0.1)
    averaged = ExponentialMovingAverage(model, 0.1, update_buffers=True)
    batch = torch.linspace(4.0, 6.0, 8).unsqueeze(1)
    for _ in range(120):
        model(batch)
        with torch.no_grad():
            for average, parameter in zip(naive.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.1)
        for ours in (copied, averaged):
            ours.update_parameters(model)
    # The weights have not moved, so the average should say what the model says.
    expected = model.eval()(batch)
    assert naive.running_mean == 0.0
    assert (naive.eval()(batch) > expected + 3.0).all()
    assert torch.equal(copied.eval()(batch), expected)
    assert torch.allclose(averaged.eval()(batch), expected, atol=0.01)


def test_one_tensor_under_two_names() -> None:
    model = Tied()
    nn.init.zeros_(model.encoder.weight)
    naive = copy.deepcopy(model)
    ours = ExponentialMovingAverage(model, 0.25)
    ours.update_parameters(model)
    nn.init.ones_(model.encoder.weight)
    new = model.state_dict()
    for name, value in naive.state_dict().items():
        value.lerp_(new[name], 0.25)
    ours.update_parameters(model)
    assert naive.encoder.weight.unique().tolist() == [1 - 0.75**2]
    assert ours.module.encoder.weight.unique().tolist() == [0.25]


# ---- Evaluations ---------------------------------------------------------------------------------


def test_an_evaluation_before_the_first_average() -> None:
    """Averaging that begins late: until then a copy from before the training is evaluated."""
    model = Weight(0.0)
    naive = AveragedModel(model)
    ours = StochasticWeightAverage(model, begin_step=4)
    seen = []
    for step in range(1, 7):
        model.set_to(float(step))
        if step >= 4:
            naive.update_parameters(model)
        ours.update_parameters(model)
        with ours.swapped(model):
            seen.append((naive.module.weight.item(), model.weight.item()))
    assert seen == [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (4.0, 4.0), (4.5, 4.5), (5.0, 5.0)]


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights, PowerFunctionEMA])
def test_an_evaluation_of_the_copy_from_before_the_training_warns(kind: Any) -> None:
    options: dict[str, Any] = {"sigma_rel": 0.1} if kind is PowerFunctionEMA else {}
    model = Weight(0.0)
    unused, copied, updated = (kind(model, **options) for _ in range(3))

    def evaluate(averaged: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with averaged.swapped(model):
                pass
        assert all(Path(one.filename).name == Path(__file__).name for one in told)
        return [str(one.message) for one in told]

    assert evaluate(unused) == []  # nothing was trained: they are the same
    copied.copy_from(model)
    updated.update_parameters(model)
    model.set_to(1.0)
    assert evaluate(copied) == evaluate(updated) == []
    (message,) = evaluate(unused)
    assert message.startswith("averages are swapped in before their first update")
    assert "begin_step=" in message
    assert model.weight == 1.0


def test_averages_that_were_loaded_are_evaluated_without_a_warning() -> None:
    model = Weight(0.0)
    trained = ExponentialMovingAverage(model)
    for _ in range(2):
        trained.update_parameters(model)
    whole, values = ExponentialMovingAverage(model), ExponentialMovingAverage(model)
    whole.load_state_dict(trained.state_dict())
    values.module.load_state_dict(trained.module.state_dict())
    model.set_to(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for averaged in (whole, values, copy.deepcopy(trained)):
            with averaged.swapped(model):
                assert model.weight == 0.0


def test_weights_that_are_remembered_by_reference() -> None:
    """``state_dict()`` is no copy: what is loaded into the model is in what was remembered."""
    models = [Weight(1.0), Weight(1.0)]
    averages = [ExponentialMovingAverage(Weight(0.5)) for _ in models]
    for average in averages:
        average.update_parameters(Weight(0.5))
    remembered = models[0].state_dict()
    models[0].load_state_dict(averages[0].module.state_dict())
    models[0].load_state_dict(remembered)
    with averages[1].swapped(models[1]):
        assert models[1].weight == 0.5
    assert models[0].weight == 0.5  # the training goes on from the average
    assert models[1].weight == 1.0


def test_an_evaluation_that_raises() -> None:
    models = [conv_net(), conv_net()]
    averages = [ExponentialMovingAverage(conv_net(seed=1), 0.1) for _ in models]
    for average in averages:
        average.update_parameters(conv_net(seed=1))
    before = [snapshot(model) for model in models]

    def naive() -> None:
        remembered = snapshot(models[0])
        models[0].load_state_dict(averages[0].module.state_dict())
        models[0](torch.ones(1, 7))  # no image: raises
        models[0].load_state_dict(remembered)

    def ours() -> None:
        with averages[1].swapped(models[1]):
            models[1](torch.ones(1, 7))

    for evaluate in (naive, ours):
        with pytest.raises((RuntimeError, ValueError)):
            evaluate()
    assert differences(snapshot(models[0]), before[0]) != []
    assert differences(snapshot(models[1]), before[1]) == []
