"""Averages of what an optimizer keeps, in place of the 16-bit weights that it writes."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import (
    AveragedWeights,
    BiasCorrectedEMA,
    ExponentialMovingAverage,
    SlowPathWarning,
    attach,
)
from ema_fused.engine import backends


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.tied = nn.Linear(7, 5)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.frozen.requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        result: Tensor = self.norm(self.frozen(self.first(batch) + self.tied(batch)))
        return result


class MasterSGD(torch.optim.Optimizer):
    """Steps on float32 copies of 16-bit weights; so small steps aren't lost."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        super().__init__([one for _, one in named], {})
        self.weights = dict(named)
        self.masters = {name: one.detach().float() for name, one in named}

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                gradient = self.weights[name].grad
                assert gradient is not None
                master.sub_(gradient.float(), alpha=1e-4)
                self.weights[name].copy_(master)

    def restart(self) -> None:
        """As after ``load_state_dict``: other objects, with other values."""
        for name in self.masters:
            self.masters[name] = self.masters[name] * 0.5

    def move(self) -> None:
        """The same objects in other memory, as optimizers that flatten their tensors leave them."""
        for master in self.masters.values():
            master.data = master * 0.5


def made() -> tuple[Network, MasterSGD]:
    torch.manual_seed(0)
    model = Network().bfloat16()
    return model, MasterSGD(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    batch = torch.randn(6, 7, generator=torch.Generator().manual_seed(step)).bfloat16()
    model(batch).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def average_of(steps: list[dict[str, Tensor]], momentum: float) -> dict[str, Tensor]:
    """The same, of recorded tensors."""
    recorded = nn.ParameterList([one.clone() for one in steps[0].values()])
    average = ExponentialMovingAverage(recorded, momentum)
    for tensors in steps:
        with torch.no_grad():
            for one, value in zip(recorded, tensors.values(), strict=True):
                one.copy_(value)
        average.update_parameters(recorded)
    return dict(zip(steps[0], average.module.parameters(), strict=True))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("backend", [None, "foreach"])
@pytest.mark.parametrize("kind", ["mapping", "function", "attached"])
def test_averages_are_those_of_the_source(kind: str, backend: str | None) -> None:
    model, optimizer = made()
    source: Any = optimizer.masters if kind == "mapping" else lambda _: dict(optimizer.masters)
    averaged = AveragedWeights(model, 0.1, source=source, backend=backend)
    attachment = attach(optimizer, model, averaged) if kind == "attached" else None
    seen = []
    for number in range(6):
        train(model, optimizer, number)
        if attachment is None:
            averaged.update_parameters(model)
        seen.append(copied(optimizer.masters))
        if number == 2:
            optimizer.restart()
        if number == 3:
            optimizer.move()
    expected = average_of(seen, 0.1)
    weights = averaged.weights
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor), name
    assert averaged.module.tied.weight is averaged.module.first.weight
    for name in ("frozen.weight", "frozen.bias", "norm.running_mean"):
        assert torch.equal(weights[name], model.state_dict()[name])
    # The steps are too small for the 16-bit weights' own average.
    assert not torch.equal(weights["first.bias"], weights["first.bias"].bfloat16().float())


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")  # the frozen ones, in 16 bits
def test_corrected_averages_begin_at_the_source_and_lead_towards_it() -> None:
    model, optimizer = made()
    averaged = BiasCorrectedEMA(model, source=optimizer.masters, lag=2)
    recorded = nn.ParameterList(copied(optimizer.masters).values())
    expected = BiasCorrectedEMA(recorded, lag=2)
    for number in range(4):
        if number:
            train(model, optimizer, number)
        with torch.no_grad():
            for one, master in zip(recorded, optimizer.masters.values(), strict=True):
                one.copy_(master)
        averaged.update_parameters(model)
        expected.update_parameters(recorded)
    read = averaged.corrected(model)
    wanted = dict(zip(optimizer.masters, expected.corrected(recorded).values(), strict=True))
    assert_equal({name: read[name] for name in wanted}, wanted)
    assert not torch.equal(read["first.bias"], averaged.weights["first.bias"])
    with averaged.swapped_corrected(model):
        inside = copied(dict(model.named_parameters()))
    rounded = {name: one.bfloat16() for name, one in wanted.items()}
    assert_equal({name: inside[name] for name in wanted}, rounded)


def test_swapped_in_they_are_rounded_and_the_source_is_left_alone() -> None:
    model, optimizer = made()
    averaged = AveragedWeights(model, 0.3, source=optimizer.masters)
    for number in range(3):
        train(model, optimizer, number)
        averaged.update_parameters(model)
    own, masters = copied(dict(model.state_dict())), copied(optimizer.masters)
    with averaged.swapped(model):
        inside = copied(dict(model.named_parameters()))
        assert_equal(optimizer.masters, masters)
    assert_equal(
        {name: inside[name] for name in masters},
        {name: averaged.weights[name].bfloat16() for name in masters},
    )
    assert_equal(dict(model.state_dict()), own)
    averaged.copy_to(model)
    assert_equal(optimizer.masters, {name: averaged.weights[name] for name in masters})
    assert_equal(
        {name: dict(model.state_dict())[name] for name in masters},
        {name: averaged.weights[name].bfloat16() for name in masters},
    )


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_dtype_frozen_parameters_and_buffers_are_as_asked_for() -> None:
    model, _ = made()
    everything = {name: tensor.double() for name, tensor in model.state_dict().items()}
    everything["norm.num_batches_tracked"] = model.norm.num_batches_tracked
    averaged = AveragedWeights(model, source=everything)
    assert {tensor.dtype for tensor in averaged.module.parameters()} == {torch.float64}
    assert averaged.weights["frozen.weight"].dtype == torch.float64
    assert averaged.weights["norm.running_var"].dtype == torch.float64
    averaged = AveragedWeights(model, source=everything, averaged_dtype=torch.float32)
    assert {tensor.dtype for tensor in averaged.module.parameters()} == {torch.float32}
    averaged = AveragedWeights(model, source=everything, share_frozen=True)
    assert averaged.shared_names == {"frozen.weight", "frozen.bias"}
    for _ in range(2):
        averaged.update_parameters(model)
    with averaged.swapped(model):
        pass
    assert averaged.weights["frozen.weight"].data_ptr() == model.frozen.weight.data_ptr()


def test_wrappers_and_either_name_of_what_is_tied_are_taken() -> None:
    model, optimizer = made()
    masters = dict(optimizer.masters)
    masters["tied.weight"] = masters.pop("first.weight")
    wrapped = torch.nn.DataParallel(model)
    averaged = AveragedWeights(wrapped, 0.5, source=lambda _: masters)
    for _ in range(2):
        averaged.update_parameters(wrapped)
    assert torch.equal(averaged.weights["first.weight"], masters["tied.weight"])


def test_what_does_not_fit_is_told_all_at_once_and_changes_nothing() -> None:
    model, optimizer = made()
    source = optimizer.masters
    averaged = AveragedWeights(model, 0.5, source=source)
    averaged.update_parameters(model)
    before = copied(averaged.weights)
    misfits: dict[str, Any] = {
        **{name: tensor for name, tensor in source.items() if name != "norm.weight"},
        "first.bias": torch.zeros(3),
        "tied.bias": torch.zeros(5, dtype=torch.long),
        "norm.bias": None,
        "last.weight": torch.zeros(1),
    }
    message = (
        r"source= doesn't fit the model: 'last.weight' isn't in the model; "
        r"'first.bias' has shape \(3,\), and \(5,\) in the model; "
        r"'tied.bias' is torch.int64, and torch.bfloat16 in the model; "
        r"'norm.bias' is a NoneType; 'norm.weight' is missing\."
    )
    with pytest.raises(ValueError, match=message):
        AveragedWeights(model, source=misfits)
    good = dict(source)
    source.clear()
    source.update(misfits)
    with pytest.raises(ValueError, match=message):
        averaged.update_parameters(model)
    assert_equal(averaged.weights, before)
    assert int(averaged.steps) == 1
    source.clear()
    source.update(good)
    averaged.update_parameters(model)
    assert int(averaged.steps) == 2
    with pytest.raises(TypeError, match=r"source is a list; a mapping"):
        AveragedWeights(model, source=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"returned a list; a mapping"):
        AveragedWeights(model, source=lambda _: [])  # type: ignore[arg-type, return-value]


def test_copies_of_the_average_have_the_same_source_and_pickles_are_refused() -> None:
    model, optimizer = made()
    averaged = AveragedWeights(model, 0.5, source=optimizer.masters)
    averaged.update_parameters(model)
    other = copy.deepcopy(averaged)
    train(model, optimizer, 0)
    for one in (averaged, other):
        one.update_parameters(model)
    assert_equal(averaged.weights, other.weights)
    with pytest.raises(TypeError, match=re.escape("save its state_dict()")):
        pickle.dumps(averaged)


def test_rounded_sources_are_no_change_of_the_model_that_is_warned_of() -> None:
    model, optimizer = made()
    with torch.no_grad():
        for name, master in optimizer.masters.items():
            master.add_(1e-4)
            optimizer.weights[name].copy_(master)
    averaged = AveragedWeights(model, source=optimizer.masters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with averaged.swapped(model):
            pass
    with torch.no_grad():
        model.first.bias.add_(1)
    with pytest.warns(UserWarning, match="before their first update"), averaged.swapped(model):
        pass


def test_without_a_source_the_update_is_one_call_of_the_extension() -> None:
    if backends.native() is None:
        pytest.skip("without the extension there is no such call")
    model, _ = made()
    averaged = AveragedWeights(model, 0.5, averaged_dtype=torch.float32)
    averaged.update_parameters(model)
    pairing = averaged._pairing
    assert pairing is not None
    assert pairing.average_at_once(averaged.module, model, averaged.update_buffers, 0.5, None, 1)


@pytest.mark.parametrize("given", ["all", "averaged"])
def test_of_what_is_left_out_the_values_are_the_models(given: str) -> None:
    model, optimizer = made()
    everything = AveragedWeights(model, 0.1, source=optimizer.masters)
    source = dict(optimizer.masters)
    if given == "averaged":
        del source["norm.weight"], source["norm.bias"]
    averaged = AveragedWeights(model, 0.1, source=source, exclude="^norm")
    for number in range(3):
        train(model, optimizer, number)
        everything.update_parameters(model)
        averaged.update_parameters(model)
    own = copied(dict(model.state_dict()))
    weights = averaged.weights
    for name in ("first.weight", "first.bias", "tied.bias"):
        assert torch.equal(weights[name], everything.weights[name])
        assert not torch.equal(weights[name], own[name].float())
    for name in averaged.left_out_names:
        assert weights[name].data_ptr() == model.state_dict()[name].data_ptr()
    with averaged.swapped(model):
        assert torch.equal(model.norm.weight, own["norm.weight"])
        assert torch.equal(model.first.bias, weights["first.bias"].bfloat16())
    assert_equal(dict(model.state_dict()), own)
    averaged.copy_to(model)
    assert torch.equal(source["first.bias"], weights["first.bias"])
    assert torch.equal(model.norm.weight, own["norm.weight"])


def test_what_is_averaged_may_not_be_missing_where_others_are_left_out() -> None:
    model, optimizer = made()
    source = {"first.bias": optimizer.masters["first.bias"]}
    with pytest.raises(ValueError, match=r"'tied.weight' is missing; 'tied.bias' is missing\. "):
        AveragedWeights(model, 0.1, source=source, exclude="^norm")


def test_a_function_is_asked_for_calls_that_average_alone() -> None:
    model, optimizer = made()
    asked: list[nn.Module] = []
    seen: list[dict[str, Tensor]] = []

    def source(of: nn.Module) -> dict[str, Tensor]:
        asked.append(of)
        return dict(optimizer.masters)

    averaged = AveragedWeights(model, 0.1, source=source, every=3)
    for number in range(7):
        train(model, optimizer, number)
        asked.clear()
        averaged.update_parameters(model)
        assert bool(asked) == (number % 3 == 0)
        if asked:
            seen.append(copied(optimizer.masters))
    assert int(averaged.steps) == 7
    expected = average_of(seen, 1 - 0.9**3)
    assert_equal({name: averaged.weights[name] for name in expected}, expected)


def test_other_views_of_the_same_memory_are_the_same_sources() -> None:
    model, optimizer = made()
    averaged = AveragedWeights(
        model, 0.1, source=lambda _: {n: one.detach() for n, one in optimizer.masters.items()}
    )
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    pairing, seen = averaged._pairing, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(10):
            train(model, optimizer, number)
            averaged.update_parameters(model)
            seen.append(copied(optimizer.masters))
        assert averaged._pairing is pairing
        averaged.copy_to(model)
    assert_equal(optimizer.masters, {name: averaged.weights[name] for name in optimizer.masters})
    optimizer.move()  # other memory
    averaged.update_parameters(model)
    assert averaged._pairing is not pairing


def test_sources_that_are_computed_each_time_are_warned_of_by_their_name() -> None:
    model, optimizer = made()
    averaged = AveragedWeights(
        model, 0.1, source=lambda _: {n: one * 1.0 for n, one in optimizer.masters.items()}
    )
    seen = []
    with pytest.warns(SlowPathWarning, match=r"source= gives 'first.weight' in other memory each"):
        for number in range(8):
            train(model, optimizer, number)
            averaged.update_parameters(model)
            seen.append(copied(optimizer.masters))
    expected = average_of(seen, 0.1)
    assert_equal({name: averaged.weights[name] for name in expected}, expected)
    before = copied(optimizer.masters)
    with pytest.warns(UserWarning, match=r"copy_to\(\) writes the averages into the weights alone"):
        averaged.copy_to(model)
    assert_equal(optimizer.masters, before)
    weights = dict(model.named_parameters())
    for name, one in expected.items():
        assert torch.equal(weights[name], one.bfloat16())
