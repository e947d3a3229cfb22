"""EmaDecaySqrt beside levanter's sums, restated in NumPy's float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ema_fused import EmaDecaySqrt
from tests.networks import ConvNet, conv_net, differences, generator, own, run, train

Arrays = dict[str, "np.ndarray[Any, np.dtype[np.float64]]"]


def arrays(tensors: dict[str, Tensor]) -> Arrays:
    return {name: tensor.detach().double().numpy().copy() for name, tensor in tensors.items()}


class Levanter:
    """The sum of weighted values and the sum of the weights, each on its own."""

    def __init__(self, beta: float, switch_step: int, decay_steps: int) -> None:
        self.beta, self.switch, self.length = beta, switch_step, decay_steps
        self.total = np.float64(0)
        self.sums: Arrays = {}

    def update(self, values: Arrays, step: int) -> Arrays:
        if step < self.switch:
            weight = np.float64(1.0 - self.beta)
        else:
            weight = 1 - np.sqrt(np.clip((step - self.switch) / self.length, 0, 1))
        self.total += weight
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
        return {name: one / self.total for name, one in self.sums.items()}


@pytest.mark.parametrize(
    ("beta", "switch", "length"), [(0.98, 200, 120), (0.0, 0, 250), (0.9, 3, 5), (0.999, 350, 40)]
)
@pytest.mark.parametrize("every", [1, 4])
def test_it_is_levanter_s_over_hundreds_of_steps(
    beta: float, switch: int, length: int, every: int
) -> None:
    model, steps = conv_net(dtype=torch.float64), generator()
    average = EmaDecaySqrt(model, beta, switch, length, every=every)
    levanter = Levanter(beta, switch, length)
    for step in range(330):
        train(model, steps)
        average.update_parameters(model)
        if step % every:
            continue
        # every= gives these values the weights of the calls since the last ones too.
        for each in range(max(0, step - every + 1), step + 1):
            expected = levanter.update(arrays(dict(model.named_parameters())), each)
        found = arrays(dict(average.module.named_parameters()))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-11)


def test_it_is_done_after_the_decay() -> None:
    model = conv_net()
    average = EmaDecaySqrt(model, 0.9, 4, 10)
    run(average, model, 15)  # steps 0 to 14, of which the last counts nothing
    done = {name: one.clone() for name, one in average.module.named_parameters()}
    run(average, model, 5, seed=1)
    assert differences(dict(average.module.named_parameters()), done) == []
    assert int(average.steps) == 20


@pytest.mark.filterwarnings("error")
def test_the_jump_at_the_switch_is_not_taken_for_a_decay() -> None:
    model = conv_net()
    average = EmaDecaySqrt(model, 0.99, 30, 10)
    run(average, model, 35)
    assert average.momentum_at(30) > 0.7 > average.momentum_at(29)


def test_begin_step_moves_the_switch() -> None:
    model, steps = conv_net(), generator()
    averages = EmaDecaySqrt(model, 0.5, 3, 6, begin_step=5), EmaDecaySqrt(model, 0.5, 3, 6)
    for call in range(1, 12):
        train(model, steps)
        averages[0].update_parameters(model)
        if call >= 5:
            averages[1].update_parameters(model)
    assert differences(own(averages[0]), own(averages[1])) == []


def test_it_resumes_to_the_bit_within_the_decay() -> None:
    model, steps = conv_net(), generator()
    average = EmaDecaySqrt(model, 0.9, 5, 20)
    run(average, model, 9)
    resumed = EmaDecaySqrt(model, 0.9, 5, 20)
    resumed.load_state_dict(copy.deepcopy(average.state_dict()))
    for _ in range(6):
        train(model, steps)
        for one in (average, resumed):
            one.update_parameters(model)
    assert differences(own(resumed), own(average)) == []


def test_on_the_device_its_numbers_are_the_same() -> None:
    model, steps = conv_net(dtype=torch.float64), generator()
    averages = EmaDecaySqrt(model, 0.9, 5, 9), EmaDecaySqrt(model, 0.9, 5, 9, capturable=True)
    for _ in range(16):
        train(model, steps)
        for one in averages:
            one.update_parameters(model)
    found, expected = (arrays(dict(one.module.named_parameters())) for one in averages)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, r"beta is 1, so nothing before switch_step"),
        ({"beta": 1.5}, ValueError, r"beta is 1\.5; a number in \[0, 1\]"),
        ({"beta": "0.9"}, TypeError, "beta is '0.9'"),
        ({"switch_step": -1}, ValueError, "switch_step is -1; at least 0"),
        ({"decay_steps": 0}, ValueError, "decay_steps is 0; at least 1"),
        ({"decay_steps": 2.5}, TypeError, r"decay_steps is 2\.5; an integer"),
        ({"interval": 2}, ValueError, "interval=2 with EmaDecaySqrt"),
        ({"decay": 0.9}, TypeError, "decay"),
    ],
)
def test_arguments_out_of_range_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EmaDecaySqrt(ConvNet(), **arguments)
