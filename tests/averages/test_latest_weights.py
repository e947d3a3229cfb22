"""LatestWeightAverage: the mean of its window to the bit, and what it keeps of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import LatestWeightAverage, StochasticWeightAverage, attach
from ema_fused.averages.checkpoint_window import CheckpointWindow
from tests.averages.latest_means import Tensors, held, mean, parameters
from tests.networks import (
    ConvNet,
    Tied,
    Weight,
    conv_net,
    differences,
    generator,
    own,
    run,
    train,
    values_of,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "interval"), [(1, 1), (2, 3), (4, 1), (6, 4)])
def test_it_is_the_mean_of_the_latest_to_the_bit(k: int, interval: int, dtype: torch.dtype) -> None:
    model, steps = conv_net(dtype=dtype), generator()
    read, unread = (LatestWeightAverage(model, k, interval) for _ in range(2))
    recorded, latest = [], own(model)
    for step in range(29):
        train(model, steps)
        read.update_parameters(model)
        unread.update_parameters(model)
        if step % interval == 0:
            recorded.append(parameters(model))
            latest = own(model)
        assert differences(held(read, model), mean(recorded[-k:])) == []
        copied = dict(read.module.named_buffers())
        assert differences(copied, {name: latest[name] for name in copied}) == []
    assert differences(own(unread), own(read)) == []  # however often it is read
    assert (read.k, int(read.window.filled)) == (k, min(k, len(recorded)))


@pytest.mark.parametrize("averaged_dtype", [torch.float32, torch.float64], ids=str)
def test_wider_means_of_16_bit_weights_are_rounded_once(averaged_dtype: torch.dtype) -> None:
    model, steps = conv_net(dtype=torch.bfloat16), generator()
    average = LatestWeightAverage(model, 3, averaged_dtype=averaged_dtype)
    recorded = []
    for _ in range(5):
        train(model, steps)
        average.update_parameters(model)
        recorded.append(parameters(model))
    assert differences(held(average, model), mean(recorded[-3:], averaged_dtype)) == []
    window = own(average.window)
    assert {one.dtype for name, one in window.items() if name != "filled"} == {torch.bfloat16}


def test_what_has_left_the_window_leaves_nothing_behind() -> None:
    average = LatestWeightAverage(Weight(), 3)
    seen = values_of(average, [1e30, -3e30, 1e30, 0.25, 0.5, 0.75, 1.5])
    assert seen[4:] == [pytest.approx(1e30 / 3, rel=1e-6), 0.5, 0.9166666865348816]


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_large_tensors_and_other_layouts_are_summed_in_pieces() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.large = nn.Parameter(torch.randn(3, 100_003))
    model.last = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    model.gaps = nn.Parameter(torch.randn(6, 8)[:, ::2])
    model.complex = nn.Parameter(torch.randn(7, dtype=torch.complex64))
    model.empty = nn.Parameter(torch.randn(0, 3))
    average = LatestWeightAverage(model, 3)
    recorded = []
    for _ in range(4):
        with torch.no_grad():
            for one in model.parameters():
                one.add_(torch.randn_like(one))
        average.update_parameters(model)
        recorded.append(parameters(model))
    found = held(average, model)
    real = [{name: one for name, one in each.items() if name != "complex"} for each in recorded]
    expected = mean(real[-3:])
    wide = torch.stack([each["complex"].to(torch.complex128) for each in recorded[-3:]])
    expected["complex"] = wide.mean(0).to(torch.complex64)
    assert differences(found, expected) == []


def test_with_room_for_all_it_is_swa() -> None:
    model, steps = conv_net(dtype=torch.float64), generator()
    ours = LatestWeightAverage(model, 20, interval=2, begin_step=4, update_buffers=True)
    swa = StochasticWeightAverage(model, interval=2, begin_step=4, update_buffers=True)
    for call in range(1, 25):
        train(model, steps)
        ours.update_parameters(model)
        swa.update_parameters(model)
        assert ours.steps == swa.steps
        if call >= 4 and int(ours.steps - 1) % 2 == 0:
            torch.testing.assert_close(dict(ours.weights), own(swa.module), rtol=1e-12, atol=1e-13)


def test_averaged_buffers_are_in_the_window_and_infinite_ones_are_the_latest() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 2, update_buffers=r"running_|scale")
    recorded = []
    for step in range(4):
        train(model, steps)
        if step == 2:
            model.scale.fill_(torch.inf)
        average.update_parameters(model)
        recorded.append({n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()})
    expected = mean(recorded[-2:])
    assert not expected["scale"].isfinite()
    expected["scale"] = recorded[-1]["scale"]
    found = dict(average.module.named_buffers())
    assert differences({name: found[name] for name in expected}, expected) == []
    assert found["norm.num_batches_tracked"] == 4
    assert "window.1.norm.running_mean" in average.state_dict()


def test_steps_between_checkpoints_touch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 2, interval=5)
    taken: list[int] = []
    take = CheckpointWindow.take

    def counted(self: CheckpointWindow, *arguments: Any, **options: Any) -> None:
        taken.append(int(average.steps))
        take(self, *arguments, **options)

    monkeypatch.setattr(CheckpointWindow, "take", counted)
    before: Tensors = {}
    for step in range(12):
        train(model, steps)
        average.update_parameters(model)
        now = {**own(average.module), **own(average.window)}
        assert (step % 5 != 0) == (differences(now, before) == [])
        before = now
    assert taken == [0, 5, 10]


def test_before_it_begins_it_is_the_latest_checkpoint() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 3, interval=2, begin_step=6)
    latest = own(model)
    for call in range(1, 8):
        train(model, steps)
        average.update_parameters(model)
        if (call - 6) % 2 == 0:
            latest = own(model)
        if call <= 7:
            assert differences(dict(average.weights), latest) == []
    assert int(average.steps) == 2
    train(model, steps)
    average.update_parameters(model)  # the first after the initial copy
    expected = mean([{n: latest[n] for n in parameters(model)}, parameters(model)])
    assert differences(held(average, model), expected) == []


def test_swaps_write_the_mean_and_give_the_weights_back() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 3)
    exchange = average.exchange_with(model)  # made before there is a mean
    recorded = []
    for _ in range(4):
        train(model, steps)
        average.update_parameters(model)
        recorded.append(parameters(model))
    present = own(model)
    exchange.put_in()
    assert differences(parameters(model), mean(recorded[-3:])) == []
    exchange.take_out()
    train(model, steps)
    average.update_parameters(model)
    recorded.append(parameters(model))
    present = own(model)
    with average.swapped(model):
        assert differences(parameters(model), mean(recorded[-3:])) == []
        with pytest.raises(RuntimeError, match="while averaged weights are swapped in"):
            average.update_parameters(model)
    assert differences(own(model), present) == []
    target = conv_net(seed=3)
    average.copy_to(target)
    assert differences(parameters(target), mean(recorded[-3:])) == []


def test_a_swap_before_the_first_update_is_warned_of() -> None:
    model = conv_net()
    average = LatestWeightAverage(model, 3)
    train(model, generator())
    with pytest.warns(UserWarning), average.swapped(model):
        pass


def test_if_an_update_raises_nothing_has_changed() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 2)
    run(average, model, 3)
    before = own(average)
    other: Any = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="doesn't match its average by name"):
        average.update_parameters(other)
    resized = conv_net()
    resized.head = nn.Linear(67, 30)
    with pytest.raises(ValueError, match="head"):
        average.update_parameters(resized)
    train(model, steps)
    model.head.weight.data = torch.zeros(5, 5)
    with pytest.raises(ValueError, match="head"):
        average.update_parameters(model)
    with pytest.raises(KeyError, match="doesn't match its average by name"):
        average.copy_from(other)
    assert differences(own(average), before) == []


def test_skipped_steps_take_no_checkpoint() -> None:
    model, steps = conv_net(), generator()
    average, careful = (
        LatestWeightAverage(model, 2),
        LatestWeightAverage(model, 2, skip_nonfinite=True),
    )
    run(average, model, 3)
    run(careful, model, 3)
    before = own(average), own(careful)
    train(model, steps)
    average.update_parameters(model, found_inf=torch.tensor(1.0))
    model.head.bias.data[3] = torch.nan
    careful.update_parameters(model)
    assert differences(own(average), before[0]) == []
    assert differences(own(careful), before[1]) == []


def test_frozen_and_left_out_parameters_are_in_no_checkpoint() -> None:
    model, steps = conv_net(), generator()
    model.hidden.requires_grad_(False)
    average = LatestWeightAverage(model, 3, share_frozen=True, exclude=r"^head\.")
    assert not any("hidden" in name or "head" in name for name in average.state_dict())
    recorded = []
    for step in range(5):
        if step == 3:
            model.hidden.requires_grad_(True)
        train(model, steps)
        average.update_parameters(model)
        recorded.append(parameters(model))
    # One that has begun to train counts with its value then in the checkpoints before.
    recorded[2]["hidden.weight"] = recorded[3]["hidden.weight"]
    expected = mean(recorded[-3:])
    for name in ("conv.weight", "hidden.weight"):
        assert torch.equal(average.weights[name], expected[name])
    assert average.weights["head.weight"].data_ptr() == model.head.weight.data_ptr()
    # A state of a run in which it trains loads where it is frozen.
    other = conv_net()
    other.hidden.requires_grad_(False)
    loaded = LatestWeightAverage(other, 3, share_frozen=True, exclude=r"^head\.")
    loaded.load_state_dict(average.state_dict())
    assert differences(own(loaded), own(average)) == []


def test_tied_weights_are_kept_once() -> None:
    model = Tied()
    average = LatestWeightAverage(model, 2)
    run(average, model, 3)
    kept = [name for name in average.state_dict() if name.startswith("window.0")]
    assert kept == ["window.0.encoder.weight"]
    read = average.weights
    assert read["encoder.weight"].data_ptr() == read["decoder.weight"].data_ptr()


def test_adopting_keeps_the_checkpoints_of_what_is_kept() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 3)
    recorded = []
    for _ in range(4):
        train(model, steps)
        average.update_parameters(model)
        recorded.append(parameters(model))
    model.extra = nn.Linear(3, 3)
    model.head = nn.Linear(67, 40)
    average.adopt(model, resize=lambda name, old, new: torch.full_like(new, 2.0))
    started = parameters(model.extra)
    train(model, steps)
    average.update_parameters(model)
    now = parameters(model)
    # What isn't kept had its new value in all checkpoints so far.
    new = {"extra.weight": started["weight"], "head.bias": torch.full((40,), 2.0)}
    names = ("conv.weight", *new)
    earlier = [{**one, **new} for one in recorded[-2:]]
    expected = mean([{name: one[name] for name in names} for one in (*earlier, now)])
    assert differences({name: average.weights[name] for name in names}, expected) == []
    del model.extra
    average.adopt(model)
    assert not any("extra" in name for name in average.state_dict())


def test_a_buffer_that_has_become_a_parameter_begins_anew() -> None:
    model, steps = conv_net(), generator()
    average = LatestWeightAverage(model, 3, update_buffers=True)
    run(average, model, 4)
    del model.scale
    model.scale = nn.Parameter(torch.tensor(7.0))
    assert "scale" in average.adopt(model).started
    train(model, steps)
    average.update_parameters(model)
    expected = (7.0 * 2 + model.scale.double()) / 3
    assert torch.equal(average.weights["scale"], expected.float())


def test_models_without_shapes_or_values_are_averaged_from_their_first_batch_on() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    average = LatestWeightAverage(lazy, 2)
    assert list(average.window.state_dict()) == ["filled"]
    lazy(torch.randn(2, 5))
    with torch.device("meta"):
        bare = nn.Linear(2, 2)
    of_bare = LatestWeightAverage(bare, 2)
    bare.to_empty(device="cpu")
    steps = generator()
    for model, one in ((lazy, average), (bare, of_bare)):
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        recorded = []
        for _ in range(3):
            train(model, steps)
            one.update_parameters(model)
            recorded.append(parameters(model))
        assert differences(held(one, model), mean(recorded[-2:])) == []


def test_moved_and_converted_its_window_stays_as_it_is() -> None:
    model = conv_net()
    average = LatestWeightAverage(model, 2)
    run(average, model, 3)
    before = own(average.window)
    average.double()
    average.to("meta")
    assert differences(own(average.window), before) == []
    assert average.state_dict()["module.conv.weight"].is_meta


def test_attached_it_counts_the_optimizer_s_steps() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = LatestWeightAverage(model, 2, interval=3)
    recorded = []
    with attach(optimizer, model, average):
        for step in range(8):
            model(torch.randn(4, 1, 5, 5, generator=generator(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 0:
                recorded.append(parameters(model))
    assert int(average.steps) == 8
    assert differences(held(average, model), mean(recorded[-2:])) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k is 0; at least 1 is expected"),
        ({"k": 2.5}, TypeError, r"k is 2\.5; an integer is expected"),
        ({"k": 2, "interval": 0}, ValueError, "interval is 0; at least 1"),
        ({"k": 2, "every": 4}, ValueError, "every=4 needs an average by a momentum"),
        ({"k": 2, "offload": "cpu"}, ValueError, "offload='cpu' needs an average by a momentum"),
        ({"k": 2, "rounding": "stochastic"}, ValueError, "rounding='stochastic' needs"),
        ({"k": 2, "capturable": True, "overlap": True}, ValueError, "overlap=True, capturable"),
        ({"k": 2, "distance_every": 3}, ValueError, "distance_every=3 needs"),
        ({"k": 2, "window": 3}, TypeError, "window"),
        ({"k": 2, "arithmetic": "axpby"}, TypeError, "arithmetic"),
    ],
)
def test_arguments_out_of_range_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LatestWeightAverage(ConvNet(), **arguments)
