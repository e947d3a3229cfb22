"""States of LatestWeightAverage: with their window, to the bit, and for averages of other kinds."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
from torch import nn

from ema_fused import ExponentialMovingAverage, LatestWeightAverage
from ema_fused.saving import averaged_state_dict, checkpoints, load_averaged_state_dict
from tests.averages.latest_means import held, mean, parameters
from tests.networks import conv_net, differences, generator, own, run, train


def go_on(averages: list[LatestWeightAverage], model: nn.Module, n: int, seed: int) -> None:
    steps = generator(seed)
    for _ in range(n):
        train(model, steps)
        for one in averages:
            one.update_parameters(model)


@pytest.mark.parametrize("calls", [1, 4, 11])
def test_it_resumes_to_the_bit_with_its_window(calls: int) -> None:
    model = conv_net()
    average = LatestWeightAverage(model, 3, interval=2)
    run(average, model, calls)
    saved = copy.deepcopy(average.state_dict())
    resumed = LatestWeightAverage(conv_net(seed=1), 3, interval=2)
    resumed.load_state_dict(saved)
    copies = [copy.deepcopy(average), pickle.loads(pickle.dumps(average))]
    go_on([average, resumed, *copies], model, 5, seed=2)
    for other in (resumed, *copies):
        assert differences(own(other), own(average)) == []


def test_a_state_is_k_and_one_times_the_model() -> None:
    model = conv_net()
    state = LatestWeightAverage(model, 4, share_frozen=True).state_dict()
    size = sum(one.nbytes for one in parameters(model).values())
    names = [f"module.{name}" for name in parameters(model)]
    names += [name for name in state if re.match(r"window\.\d", name)]
    assert sum(state[name].nbytes for name in names) == 5 * size


@pytest.mark.parametrize(("before", "after"), [(5, 2), (2, 5), (5, 4), (3, 1)])
@pytest.mark.parametrize("calls", [3, 9])
def test_windows_of_another_size_keep_the_latest(before: int, after: int, calls: int) -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, before)
    recorded = []
    for _ in range(calls):
        train(model, steps)
        average.update_parameters(model)
        recorded.append(parameters(model))
    other = LatestWeightAverage(model, after)
    other.load_state_dict(average.state_dict())
    kept = recorded[-min(before, after) :]
    assert differences(held(other, model), mean(kept)) == []
    train(model, steps)
    other.update_parameters(model)
    kept = [*kept, parameters(model)][-after:]
    assert differences(held(other, model), mean(kept)) == []
    state = dict(average.state_dict())
    del state["window.0.conv.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*\.conv\.weight"):
        LatestWeightAverage(model, before).load_state_dict(state)


def test_an_average_of_another_kind_counts_as_one_checkpoint() -> None:
    model, steps = conv_net(), generator()
    ema = ExponentialMovingAverage(model, 0.3)
    run(ema, model, 3)
    loaded = LatestWeightAverage(model, 2)
    with pytest.warns(UserWarning, match="no window of checkpoints"):
        loaded.load_state_dict(ema.state_dict())
    foreign = LatestWeightAverage(model, 2)
    run(foreign, model, 4, seed=5)
    report = foreign.load_state_from(ema.state_dict())
    assert report.lost[-1].startswith("the checkpoints of a window")
    first = parameters(ema.module)
    train(model, steps)
    for one in (loaded, foreign):
        assert differences(held(one, model), first) == []
        one.update_parameters(model)
        assert differences(held(one, model), mean([first, parameters(model)])) == []


def test_its_state_is_an_average_for_others_too() -> None:
    model = conv_net()
    average = LatestWeightAverage(model, 2)
    run(average, model, 4)
    others = ExponentialMovingAverage(model, 0.1), LatestWeightAverage(model, 2)
    for other, lost in zip(others, (1, 0), strict=True):
        report = other.load_state_from(average.state_dict())
        assert (report.format, report.steps, len(report.lost)) == ("ema_fused", 4, lost)
        assert differences(held(other, model), held(average, model)) == []
    assert int(others[1].window.filled) == 2  # in its own class with all checkpoints


def test_weights_that_are_loaded_before_the_first_update_count_as_one() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 2)
    average.module.load_state_dict(conv_net(seed=4).state_dict())
    first = held(average, model)
    train(model, steps)
    with pytest.warns(UserWarning):
        average.update_parameters(model)
    assert int(average.steps) == 2
    assert differences(held(average, model), mean([first, parameters(model)])) == []


def test_copy_from_leaves_one_checkpoint() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 3)
    run(average, model, 4)
    train(model, steps)
    average.copy_from(model)
    first = parameters(model)
    assert differences(dict(average.weights), own(model)) == []
    train(model, steps)
    average.update_parameters(model)
    assert differences(held(average, model), mean([first, parameters(model)])) == []


def test_it_goes_through_distributed_checkpoints_into_a_fresh_average(tmp_path: Path) -> None:
    model = conv_net()
    average = LatestWeightAverage(model, 3)
    run(average, model, 5)
    checkpoints.save({"averaged": averaged_state_dict(average, model)}, tmp_path / "saved")
    fresh = LatestWeightAverage(conv_net(seed=2), 3)
    run(fresh, conv_net(seed=2), 4)  # its window isn't in the order of its memory any more
    state = averaged_state_dict(fresh, model)
    checkpoints.load({"averaged": state}, tmp_path / "saved")
    load_averaged_state_dict(fresh, model, state)
    go_on([average, fresh], model, 4, seed=8)
    assert differences(own(fresh), own(average)) == []
