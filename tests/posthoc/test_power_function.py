"""PowerFunctionEMA: its averages against the recursion written out, and how it follows a model."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ema_fused import ExponentialMovingAverage, PowerFunctionEMA
from ema_fused.posthoc.power_profiles import LARGEST_SIGMA_REL, gamma_of
from tests.networks import (
    CPU_BACKENDS,
    Cached,
    Tied,
    Weight,
    conv_net,
    differences,
    generator,
    snapshot,
    train,
)

WIDTHS = (0.05, 0.10, 0.2)


def gamma_by_numpy(sigma_rel: float) -> float:
    v = sigma_rel**-2
    return float(np.roots([1, 7, 16 - v, 12 - v]).real.max())


def written_out(values: list[Tensor], times: list[int], sigma_rel: float) -> Tensor:
    """The recursion of the paper in float64."""
    gamma = gamma_by_numpy(sigma_rel)
    average = torch.zeros_like(values[0], dtype=torch.float64)
    before = 0
    for value, time in zip(values, times, strict=True):
        beta = (1 - (time - before) / time) ** (gamma + 1)
        average = beta * average + (1 - beta) * value.double()
        before = time
    return average


def run(ema: PowerFunctionEMA, model: nn.Module, steps: int, seed: int = 0) -> list[Any]:
    """Trains and averages; copies of the model's state at every step."""
    random = generator(seed)
    seen = []
    for _ in range(steps):
        train(model, random)
        ema.update_parameters(model)
        seen.append(copy.deepcopy(model.state_dict()))
    return seen


# Widths.


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.15, 0.2, 0.28, 0.2886])
def test_gamma_is_the_largest_root(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert gamma == pytest.approx(gamma_by_numpy(sigma_rel), rel=1e-9)
    width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert width == pytest.approx(sigma_rel, rel=1e-12)


def test_the_width_is_the_standard_deviation_of_the_profile() -> None:
    times = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for sigma_rel in WIDTHS:
        gamma = gamma_of(sigma_rel)
        profile = (gamma + 1) * times**gamma
        mean = torch.trapezoid(profile * times, times)
        variance = torch.trapezoid(profile * (times - mean) ** 2, times)
        assert math.sqrt(variance.item()) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, LARGEST_SIGMA_REL, 0.3, math.nan, math.inf])
def test_a_width_that_no_profile_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel is .*\(0, 0\.2887\) is expected"):
        PowerFunctionEMA(Weight(), (0.05, sigma_rel))


@pytest.mark.parametrize("sigma_rel", [(), [0.01 * (k + 1) for k in range(9)]])
def test_too_few_or_many_widths_are_refused(sigma_rel: Any) -> None:
    with pytest.raises(ValueError, match=f"sigma_rel has {len(sigma_rel)} widths; 1 to 8"):
        PowerFunctionEMA(Weight(), sigma_rel)


def test_a_width_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="different widths are expected"):
        PowerFunctionEMA(Weight(), (0.1, 0.1))


# The averages.


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("widths", [WIDTHS, (0.07,)], ids=["three", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_averages_are_the_recursion_and_buffers_follow(
    dtype: torch.dtype, widths: tuple[float, ...], backend: str | None
) -> None:
    model = conv_net(dtype=dtype)
    ema = PowerFunctionEMA(model, widths, backend=backend)
    seen = run(ema, model, 40)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = dict(model.named_parameters())
    for width in widths:
        average = ema.average(width)
        assert average.keys() == model.state_dict().keys()
        for name, tensor in average.items():
            if name not in parameters:
                assert tensor.dtype == seen[-1][name].dtype
                assert torch.equal(tensor, seen[-1][name]), name
                continue
            assert tensor.dtype == kept
            expected = written_out([one[name] for one in seen], list(range(1, 41)), width)
            tolerance = 1e-14 if kept == torch.float64 else 2e-6
            torch.testing.assert_close(tensor.double(), expected, rtol=tolerance, atol=tolerance)
    assert (ema.time, ema.steps) == (40, 40)


def test_time_may_count_samples() -> None:
    sizes = [4, 4, 1, 7, 16, 2]
    model = Weight().double()
    ema = PowerFunctionEMA(model, (0.05, 0.2))
    values = []
    for k, size in enumerate(sizes):
        values.append(torch.tensor(float(k * k)))
        ema.update_parameters(model.set_to(float(k * k)), samples=size)
    times = np.cumsum(sizes).tolist()
    assert (ema.time, ema.steps) == (34, 6)
    for width in ema.sigma_rel:
        expected = written_out(values, times, width)
        assert ema.average(width)["weight"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_batches_count_as_steps() -> None:
    one, other = (PowerFunctionEMA(Weight().double()) for _ in range(2))
    model = Weight().double()
    for k in range(20):
        model.set_to(math.sin(k))
        one.update_parameters(model)
        other.update_parameters(model, samples=256)
    for width in one.sigma_rel:
        ours, theirs = (ema.average(width)["weight"].item() for ema in (one, other))
        assert ours == pytest.approx(theirs, rel=1e-13)


def test_all_averages_are_updated_by_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from ema_fused.posthoc import paired_plan

    made = []

    class Counted(paired_plan.Plan):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(paired_plan, "Plan", Counted)
    model = conv_net()
    run(PowerFunctionEMA(model, WIDTHS), model, 10)
    (plan,) = made
    assert plan.averages == 3
    assert plan.launches <= 1


# Following the model.


def test_tied_weights_are_averaged_once_and_stay_tied() -> None:
    model = Tied()
    ema = PowerFunctionEMA(model, 0.1)
    seen = run(ema, model, 9)
    average = ema.average()
    expected = written_out([one["encoder.weight"] for one in seen], list(range(1, 10)), 0.1)
    torch.testing.assert_close(average["encoder.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert average["decoder.weight"].data_ptr() == average["encoder.weight"].data_ptr()
    assert sum(1 for _ in ema.averages.parameters()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model.head, "bias", nn.Parameter(torch.full((31,), 5.0))),
        lambda model: setattr(model.head.weight, "data", torch.full((31, 67), 5.0)),
        lambda model: model.register_buffer("scale", torch.tensor(7.0)),
    ],
    ids=["double", "parameter", "data", "buffer"],
)
def test_replaced_tensors_are_followed(change: Callable[[Any], object]) -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model, WIDTHS)
    seen = run(ema, model, 3)
    change(model)
    random = generator(7)
    for _ in range(3):
        train(model, random)
        ema.update_parameters(model)
        seen.append(copy.deepcopy(model.state_dict()))
    for width in WIDTHS:
        for name, tensor in ema.average(width).items():
            values = [one[name] for one in seen]
            is_averaged = name in dict(model.named_parameters())
            expected = written_out(values, list(range(1, 7)), width) if is_averaged else values[-1]
            torch.testing.assert_close(tensor.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_a_wrapped_model_and_another_of_its_structure_serve() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model)
    ema.update_parameters(nn.DataParallel(model))
    ema.update_parameters(conv_net(1))
    assert ema.steps == 2


def test_a_model_that_does_not_match_is_refused_by_name_and_nothing_changes() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model)
    run(ema, model, 3)
    before = copy.deepcopy(ema.state_dict())
    other = conv_net()
    other.head = nn.Linear(67, 30)
    with pytest.raises(ValueError, match=r"'head\.weight' has shape"):
        ema.update_parameters(other)
    del model.norm.running_mean
    with pytest.raises(KeyError, match=r"norm\.running_mean"):
        ema.update_parameters(model)
    after = ema.state_dict()
    assert after.pop("_extra_state") == before.pop("_extra_state")
    assert differences(after, before) == []


@pytest.mark.parametrize(
    ("samples", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError)]
)
def test_samples_are_counted(samples: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"samples is .* expected"):
        PowerFunctionEMA(Weight()).update_parameters(Weight(), samples=samples)


def test_caches_are_not_saved_but_follow() -> None:
    model = Cached()
    ema = PowerFunctionEMA(model, 0.1)
    assert model.cache is not None
    model.cache.fill_(3.0)
    ema.update_parameters(model)
    assert not any("cache" in name for name in ema.state_dict())
    assert ema.averages[0].get_buffer("cache").tolist() == [3.0, 3.0]


def test_a_model_that_cannot_be_copied_has_averages() -> None:
    model = Weight()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="lock"):
        copy.deepcopy(model)
    PowerFunctionEMA(model).update_parameters(model)


def test_a_deleted_model_is_let_go() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model)
    ema.update_parameters(model)
    weight = weakref.ref(model.head.weight)
    del model
    gc.collect()
    assert weight() is None


def test_swapped_in_averages_are_not_averaged_again() -> None:
    model = conv_net()
    swapping = ExponentialMovingAverage(model)
    ema = PowerFunctionEMA(model)
    with swapping.swapped(model), pytest.raises(RuntimeError, match="swapped in"):
        ema.update_parameters(model)
    assert ema.steps == 0


# Using and saving.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy_to_puts_one_average_into_a_model(dtype: torch.dtype) -> None:
    model = conv_net(dtype=dtype)
    ema = PowerFunctionEMA(model)
    run(ema, model, 6)
    target = conv_net(3, dtype)
    ema.copy_to(target, sigma_rel=0.1)
    expected = {name: one.to(target.state_dict()[name]) for name, one in ema.average(0.1).items()}
    assert differences(dict(target.state_dict()), expected) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_runs_the_model_with_the_average_that_is_named(dtype: torch.dtype) -> None:
    model = conv_net(dtype=dtype)
    ema = PowerFunctionEMA(model, WIDTHS)
    run(ema, model, 5)
    state, held = snapshot(model), {w: snapshot_of(ema, w) for w in WIDTHS}
    for width in WIDTHS:
        with ema.swapped(model, sigma_rel=width) as inside:
            assert inside is model
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                assert torch.equal(tensor, held[width][name].to(tensor.dtype)), name
            refused: list[Callable[[], object]] = [
                lambda: ema.update_parameters(model),
                lambda: ema.copy_to(model, sigma_rel=0.05),
                lambda: ema.copy_from(model),
                lambda: ema.average(0.05),
                lambda: ema.swapped(conv_net(dtype=dtype), sigma_rel=0.05).__enter__(),
                lambda: ema.save_snapshot("nowhere"),
                lambda: copy.deepcopy(ema),
                ema.state_dict,
            ]
            for action in refused:
                with pytest.raises(RuntimeError, match="while averaged weights are swapped in"):
                    action()
    with pytest.raises(OSError), ema.swapped(model, sigma_rel=0.05):
        raise OSError
    assert differences(snapshot(model), state) == []
    for width in WIDTHS:
        assert differences(snapshot_of(ema, width), held[width]) == []
    assert ema.steps == 5


def snapshot_of(ema: PowerFunctionEMA, width: float) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ema.average(width).items()}


def test_a_width_that_is_not_kept_is_not_swapped_in() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model, WIDTHS)
    with pytest.raises(ValueError, match=r"sigma_rel is 0\.3, and averages of 0\.05"):
        ema.swapped(model, sigma_rel=0.3)


def test_copy_from_sets_all_averages_and_no_time() -> None:
    model, other = conv_net(), conv_net(seed=1)
    ema = PowerFunctionEMA(model, WIDTHS)
    run(ema, model, 5)
    ema.copy_from(other)
    assert (ema.time, ema.steps) == (5, 5)
    for width in WIDTHS:
        assert differences(ema.average(width), snapshot(other)) == []
    model.double()
    ema.copy_from(model)  # the plan was one for float32
    for width in WIDTHS:
        expected = {name: value.float() for name, value in snapshot(model).items()}
        assert {n: v.float() for n, v in ema.average(width).items()}.keys() == expected.keys()
        for name, value in ema.average(width).items():
            assert torch.equal(value.float(), expected[name]), name


@pytest.mark.parametrize("sigma_rel", [None, 0.07])
def test_an_average_that_is_not_kept_is_refused(sigma_rel: float | None) -> None:
    ema = PowerFunctionEMA(Weight())
    with pytest.raises(ValueError, match=r"averages of 0\.05, 0\.1 are kept"):
        ema.copy_to(Weight(), sigma_rel=sigma_rel)


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    model = conv_net()
    straight = PowerFunctionEMA(model, WIDTHS)
    random = generator()

    def go(ema: PowerFunctionEMA, steps: int) -> None:
        for _ in range(steps):
            train(model, random)
            ema.update_parameters(model, samples=3)

    go(straight, 5)
    file = tmp_path / "checkpoint.pt"
    torch.save([model.state_dict(), straight.state_dict(), random.get_state()], file)
    go(straight, 5)
    expected = straight.state_dict()

    states = torch.load(file, weights_only=True)
    model = conv_net(9)
    model.load_state_dict(states[0])
    resumed = PowerFunctionEMA(conv_net(8), WIDTHS)
    resumed.load_state_dict(states[1])
    random.set_state(states[2])
    go(resumed, 5)
    found = resumed.state_dict()
    assert found.pop("_extra_state") == expected.pop("_extra_state")
    assert differences(found, expected) == []


def test_a_state_of_other_widths_is_refused() -> None:
    ema = PowerFunctionEMA(Weight(), (0.05, 0.1))
    with pytest.raises(ValueError, match=r"sigma_rel \(0\.05, 0\.1\), and this object keeps"):
        PowerFunctionEMA(Weight(), (0.1, 0.05)).load_state_dict(ema.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_copies_go_on_by_themselves(copied: Callable[[PowerFunctionEMA], PowerFunctionEMA]) -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model)
    run(ema, model, 3)
    before = copy.deepcopy(ema.average(0.1))
    other = copied(ema)
    run(other, model, 3)
    assert differences(ema.average(0.1), before) == []
    assert (ema.steps, other.steps) == (3, 6)
    run(ema, model, 0)
    assert differences(other.average(0.1), before) != []


def test_no_snapshot_before_the_first_update(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="before the first update"):
        PowerFunctionEMA(Weight()).save_snapshot(tmp_path)


def _larger(model: nn.Module) -> None:
    model.scale = torch.arange(3.0)


def _larger_in_place(model: nn.Module) -> None:
    model.scale.resize_(3).fill_(2.0)


def _later(model: nn.Module) -> None:
    model.norm.register_buffer("later", torch.arange(4.0))


@pytest.mark.parametrize("change", [_larger, _larger_in_place, _later])
def test_buffers_follow_the_models_shapes(change: Callable[[nn.Module], None]) -> None:
    model, plain = conv_net(), conv_net()
    ema, beside = PowerFunctionEMA(model), PowerFunctionEMA(plain)
    for step in range(4):
        if step == 2:
            change(model)
        for one, network in ((ema, model), (beside, plain)):
            with torch.no_grad():
                for number, parameter in enumerate(network.parameters()):
                    parameter.add_(step + number)
            one.update_parameters(network)
    buffers = dict(model.named_buffers())
    for width in ema.sigma_rel:
        ours, theirs = ema.average(width), beside.average(width)
        assert all(torch.equal(ours[name], buffers[name]) for name in buffers)
        parameters = dict(plain.named_parameters())
        assert all(torch.equal(ours[name], theirs[name]) for name in parameters)


def test_buffers_stay_as_they_are_where_more_has_changed() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model)
    ema.update_parameters(model)
    _larger(model)
    model.head = nn.Linear(67, 32)
    with pytest.raises(ValueError, match=r"head\.weight.*averaged\.adopt"):
        ema.update_parameters(model)
    assert all(average.scale.shape == () for average in ema.averages)
