"""BiasCorrectedEMA: its formula to the bit, its read-outs, its state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import BiasCorrectedEMA
from ema_fused.averages import schedules
from ema_fused.saving import averaged_state_dict, load_averaged_state_dict
from tests.networks import ConvNet, Tied, conv_net, differences, generator, train
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALES: dict[str, dict[str, Any]] = {
    "default": {},
    "other powers": {"ema_power": 0.3, "bias_power": 0.7, "lag": 3, "multiplier": 2.5},
    "least": {"min_momentum": 0.28},
    "no average": {"ema_power": 0.0},
    "no correction": {"bias_power": 300.0},
    "later": {"steps_before": 7},
}


class ByHand:
    """The formula, one tensor and one operation of torch at a time."""

    def __init__(self, model: nn.Module, **scales: Any) -> None:
        defaults = {"ema_power": 0.5, "bias_power": 0.2, "lag": 10, "multiplier": 1.0}
        self.scales = {**defaults, "min_momentum": 0.0, "steps_before": 0, **scales}
        self.initial = values(model)
        self.average = values(model)
        self.corrected = values(model)

    def update(self, model: nn.Module, step: int) -> None:
        scales = self.scales
        reached = scales["lag"] + scales["multiplier"] * (step + scales["steps_before"])
        momentum = max(reached ** -scales["ema_power"], scales["min_momentum"])
        for name, now in values(model).items():
            average = self.average[name]
            average.mul_(1 - momentum).add_(now, alpha=momentum)
            moved = now - self.initial[name]
            self.corrected[name] = average + reached ** -scales["bias_power"] * moved


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def of_parameters(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: tensors[name] for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # 16 bits, and a momentum above 1/2
def test_it_is_the_formula_to_the_bit(scales: str, dtype: torch.dtype) -> None:
    options = SCALES[scales]
    model, steps = conv_net(dtype=dtype), generator()
    average = BiasCorrectedEMA(model, **options)
    average.update_parameters(model)
    by_hand = ByHand(model, **options)
    for step in range(1, 6):
        train(model, steps)
        average.update_parameters(model)
        by_hand.update(model, step)
        assert differences(of_parameters(average.weights, model), by_hand.average) == []
        read = average.corrected(model)
        assert differences(of_parameters(read, model), by_hand.corrected) == []
        assert read.keys() == model.state_dict().keys()
    assert (scales == "no correction") == (differences(by_hand.corrected, by_hand.average) == [])


def test_intervals_and_a_late_beginning() -> None:
    model, steps = conv_net(), generator()
    average = BiasCorrectedEMA(model, interval=3, begin_step=2, steps_before=2)
    by_hand: ByHand | None = None
    for call in range(1, 12):
        train(model, steps)
        average.update_parameters(model)
        if call < 2:
            # Not begun: it follows the model, and so does what is read out.
            assert differences(of_parameters(average.corrected(model), model), values(model)) == []
        elif call == 2:
            by_hand = ByHand(model, steps_before=2)
        elif (call - 2) % 3 == 0:
            assert by_hand is not None
            by_hand.update(model, call - 2)
            read = average.corrected(model)
            assert differences(of_parameters(read, model), by_hand.corrected) == []


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
@pytest.mark.parametrize(
    "options", [{"offload": "cpu"}, {"overlap": True}, {"capturable": True}], ids=str
)
def test_wherever_it_is_updated_it_is_the_same(options: dict[str, Any]) -> None:
    model, steps = conv_net(), generator()
    averages = BiasCorrectedEMA(model), BiasCorrectedEMA(model, **options)
    for _ in range(5):
        train(model, steps)
        for average in averages:
            average.update_parameters(model)
    found, expected = (average.corrected(model) for average in averages)
    assert differences(found, expected) == []


def trained(model: nn.Module, average: BiasCorrectedEMA, steps: torch.Generator, n: int) -> None:
    for _ in range(n):
        train(model, steps)
        average.update_parameters(model)


def test_a_resumed_average_goes_on_to_the_bit() -> None:
    model, steps = conv_net(), generator()
    average = BiasCorrectedEMA(model)
    trained(model, average, steps, 4)
    saved = copy.deepcopy((model.state_dict(), average.state_dict(), steps.get_state()))
    trained(model, average, steps, 3)

    again = conv_net(seed=1)
    again.load_state_dict(saved[0])
    resumed = BiasCorrectedEMA(again)
    resumed.load_state_dict(saved[1])
    steps = generator()
    steps.set_state(saved[2])
    trained(again, resumed, steps, 3)
    assert differences(dict(resumed.state_dict()), dict(average.state_dict())) == []
    assert differences(resumed.corrected(again), average.corrected(model)) == []
    # Without its initial values it would be another: they are a part of the state.
    with pytest.raises(RuntimeError, match=r'Missing key.*"initial\.conv\.weight"'):
        resumed.load_state_dict({k: v for k, v in saved[1].items() if not k.startswith("initial")})


def test_copies_and_pickles_are_whole() -> None:
    model, steps = conv_net(), generator()
    average = BiasCorrectedEMA(model)
    trained(model, average, steps, 3)
    others = [copy.deepcopy(average), pickle.loads(pickle.dumps(average))]
    trained(model, average, steps, 0)
    train(model, steps)
    for one in (average, *others):
        one.update_parameters(model)
    for other in others:
        assert differences(other.corrected(model), average.corrected(model)) == []


def test_frozen_parameters_take_no_memory_until_they_train() -> None:
    model, steps = conv_net(), generator()
    model.hidden.requires_grad_(False)
    average = BiasCorrectedEMA(model, share_frozen=True)
    assert not any("hidden" in name for name in average.state_dict())
    average.update_parameters(model)
    train(model, steps)
    average.update_parameters(model)
    assert average.corrected(model)["hidden.weight"].data_ptr() == model.hidden.weight.data_ptr()
    model.hidden.requires_grad_(True)
    average.update_parameters(model)  # starts with its value now
    began = model.hidden.weight.detach().clone()
    train(model, steps)
    average.update_parameters(model)
    now, held = model.hidden.weight.detach(), average.weights["hidden.weight"]
    assert torch.equal(average.state_dict()["initial.hidden.weight"], began)
    expected = held + 13**-0.2 * (now - began)
    assert torch.equal(average.corrected(model)["hidden.weight"], expected)
    # A state of a run in which it trains loads where it is frozen.
    other = conv_net()
    other.hidden.requires_grad_(False)
    loaded = BiasCorrectedEMA(other, share_frozen=True)
    loaded.load_state_dict(average.state_dict())
    assert differences(dict(loaded.state_dict()), dict(average.state_dict())) == []


def test_tied_weights_have_one_initial_value() -> None:
    model = Tied()
    average = BiasCorrectedEMA(model)
    average.update_parameters(model)
    trained(model, average, generator(), 2)
    state = average.state_dict()
    assert state["initial.encoder.weight"].data_ptr() == state["initial.decoder.weight"].data_ptr()
    read = average.corrected(model)
    assert torch.equal(read["encoder.weight"], read["decoder.weight"])


def test_adopt_and_copy_from_keep_it_whole() -> None:
    model, steps = conv_net(), generator()
    average = BiasCorrectedEMA(model)
    trained(model, average, steps, 3)
    before = copy.deepcopy(average.state_dict())
    model.extra = nn.Linear(3, 3)
    average.adopt(model)
    state = average.state_dict()
    assert differences({name: state[name] for name in before}, dict(before)) == []
    assert torch.equal(state["initial.extra.weight"], model.extra.weight)
    del model.extra
    average.adopt(model)
    assert differences(dict(average.state_dict()), dict(before)) == []
    train(model, steps)
    average.copy_from(model)
    initial = {name: average.state_dict()[f"initial.{name}"] for name in values(model)}
    assert differences(initial, values(model)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_read_out_into_the_model_and_into_others(dtype: torch.dtype) -> None:
    model, steps = conv_net(), generator()
    average = BiasCorrectedEMA(model, averaged_dtype=torch.float64)
    trained(model, average, steps, 4)
    read = average.corrected(model)
    assert read["conv.weight"].dtype == torch.float64
    target = conv_net(seed=1, dtype=dtype)
    buffers = {name: buffer.clone() for name, buffer in target.named_buffers()}
    average.write_corrected(target, model)
    rounded = {name: tensor.to(dtype) for name, tensor in of_parameters(read, model).items()}
    assert differences(values(target), rounded) == []
    assert differences(dict(target.named_buffers()), buffers) == []
    own, held = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state_dict())
    with average.swapped_corrected(model) as inside:
        assert inside is model
        singles = {name: tensor.float() for name, tensor in of_parameters(read, model).items()}
        assert differences(values(model), singles) == []
        with pytest.raises(RuntimeError, match="while averaged weights are swapped in"):
            average.update_parameters(model)
        with pytest.raises(RuntimeError, match=r"corrected\(\) was called while averaged"):
            average.corrected(model)
    assert differences(dict(model.state_dict()), dict(own)) == []
    assert differences(dict(average.state_dict()), dict(held)) == []


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lag": -1}, ValueError, r"lag is -1; a finite number, 0 or more"),
        ({"multiplier": "2"}, TypeError, "multiplier is '2'"),
        ({"ema_power": -0.5}, ValueError, r"ema_power is -0\.5; a finite number, 0 or more"),
        ({"bias_power": -0.5}, ValueError, r"bias_power is -0\.5; a finite number"),
        ({"min_momentum": 2}, ValueError, r"least is 2.*a number in \[0, 1\] is expected"),
        ({"steps_before": 1.5}, TypeError, r"steps_before is 1\.5"),
        ({"lag": 0, "multiplier": 0}, ValueError, "which has no inverse power; pass a lag above"),
        ({"beta": 0.1}, TypeError, "beta"),
    ],
)
def test_arguments_out_of_range_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BiasCorrectedEMA(conv_net(), **options)


def test_another_model_is_refused_and_nothing_changes() -> None:
    model, steps = conv_net(), generator()
    average = BiasCorrectedEMA(model)
    trained(model, average, steps, 2)
    before = copy.deepcopy(average.state_dict())
    other: Any = nn.Linear(2, 2)
    for use in (average.update_parameters, average.corrected):
        with pytest.raises(KeyError, match="doesn't match its average by name"):
            use(other)
    with pytest.raises(KeyError, match="doesn't match its average by name"):
        average.write_corrected(other, model)
    with pytest.raises(TypeError, match=r"corrected\(\)"):
        average.corrected(3)  # type: ignore[arg-type]
    assert differences(dict(average.state_dict()), dict(before)) == []


def test_its_momentum_is_a_schedule_of_ours() -> None:
    average = BiasCorrectedEMA(ConvNet(), ema_power=0.4, lag=5, steps_before=3)
    assert average.momentum_at(2) == schedules.inverse_power(5, power=0.4, lag=5)
    assert average.momentum_at(2) == (5 + 1.0 * 5) ** -0.4


def of_shards() -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    model = spread(perceptron(), "fsdp2")
    steps = torch.Generator().manual_seed(3)
    average = BiasCorrectedEMA(model)
    average.update_parameters(model)

    def step() -> None:
        for parameter in model.parameters():
            whole: Any = parameter
            # The same in each process, and on one process alone.
            change = torch.randn(whole.full_tensor().shape, generator=steps)
            with torch.no_grad():
                placed: Any = torch.distributed.tensor.distribute_tensor(
                    change, whole.device_mesh, whole.placements
                )
                parameter.add_(placed)

    for _ in range(2):
        step()
        average.update_parameters(model)
    saved = averaged_state_dict(average, model, full_state_dict=True)
    resumed = BiasCorrectedEMA(model)
    load_averaged_state_dict(resumed, model, saved)
    step()
    resumed.update_parameters(model)
    read: Any = resumed.corrected(model)
    whole = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in read.items()}
    expected = {}
    plain, steps = perceptron(), torch.Generator().manual_seed(3)
    by_hand = ByHand(plain)
    for number in (1, 2, 3):
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=steps))
        by_hand.update(plain, number)
    expected = by_hand.corrected
    with resumed.swapped_corrected(model):
        inside = [
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter.full_tensor(), expected[name])  # type: ignore[attr-defined]
        ]
    return of_parameters(whole, plain), expected, inside


def test_shards_are_corrected_and_resumed_to_the_bit(two_ranks: Ranks) -> None:
    for found, expected, inside in two_ranks.run(of_shards):
        assert differences(found, expected) == []
        assert inside == []


def refusal_of_flattened() -> str:
    with pytest.raises(ValueError) as raised:
        BiasCorrectedEMA(spread(perceptron(), "fsdp1"))
    return str(raised.value)


def test_flattened_parameters_are_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(refusal_of_flattened):
        assert message.startswith("BiasCorrectedEMA of a model sharded by FSDP1")
