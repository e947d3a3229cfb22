"""``update_buffers`` by name: those that are chosen are averaged, the others copied."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage, StochasticWeightAverage
from ema_fused.modules.pairing import Pairing
from ema_fused.posthoc.power_function import PowerFunctionEMA
from tests.networks import conv_net, differences, run, snapshot

STATISTICS = ("norm.running_mean", "norm.running_var")


class OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


def is_statistic(name: str, buffer: Tensor) -> bool:
    return "running" in name and buffer.dim() == 1


CHOICES: list[Any] = [
    "running_",
    r"\.running_(mean|var)$",
    re.compile("^norm\\.running"),
    ["running_mean", re.compile("running_var")],
    ("running_mean", "running_var"),
    is_statistic,
]


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _named(choice: object) -> str:
    """Without the address of a function, which differs between the processes of a test run."""
    return str(getattr(choice, "__name__", choice))


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights, OneByOne])
@pytest.mark.parametrize("choice", CHOICES, ids=_named)
def test_what_is_chosen_is_averaged_and_the_rest_copied(kind: Any, choice: Any) -> None:
    arguments = {} if kind is OneByOne else {"momentum": 0.5}
    model, whole = conv_net(), conv_net()
    averaged = kind(model, **arguments, update_buffers=choice)
    every_buffer = kind(whole, **arguments, update_buffers=True)
    for one, its_model in ((averaged, model), (every_buffer, whole)):
        run(one, its_model, 4)
    kept, all_averaged = buffers_of(averaged.module), buffers_of(every_buffer.module)
    for name in STATISTICS:
        assert torch.equal(kept[name], all_averaged[name])
        assert not torch.equal(kept[name], dict(model.named_buffers())[name])
    assert torch.equal(kept["scale"], model.scale)
    assert not torch.equal(all_averaged["scale"], model.scale)
    assert torch.equal(kept["norm.num_batches_tracked"], model.norm.num_batches_tracked)
    assert (
        differences(
            dict(averaged.module.named_parameters()), dict(every_buffer.module.named_parameters())
        )
        == []
    )


@pytest.mark.parametrize("choice", CHOICES, ids=_named)
def test_an_exchange_of_averages_and_their_dict_have_what_is_chosen(choice: Any) -> None:
    model = conv_net()
    averaged = StochasticWeightAverage(model, update_buffers=choice)
    run(averaged, model, 3)
    with torch.no_grad():
        model.scale.fill_(7.0)
    parameters = {name for name, _ in model.named_parameters()}
    assert set(averaged.avg_parameters) == parameters | set(STATISTICS)
    averages, before = snapshot(averaged.module), snapshot(model)
    exchange = averaged.exchange_with(model, averages_alone=True)
    exchange.put_in()
    now = snapshot(model)
    chosen = parameters | set(STATISTICS)
    assert all(torch.equal(now[name], averages[name]) for name in chosen)
    assert now["scale"] == 7.0 and averaged.module.scale != 7.0
    exchange.take_out()
    assert differences(snapshot(model), before) == []
    with averaged.swapped(model):  # exchanges everything that the average holds
        assert torch.equal(model.norm.running_mean, averages["norm.running_mean"])
        assert model.scale != 7.0
    assert differences(snapshot(model), before) == []


def test_names_are_those_of_the_plain_model() -> None:
    wrapped = nn.DataParallel(conv_net())
    for kind in (ExponentialMovingAverage, AveragedWeights):
        averaged = kind(wrapped, 0.5, update_buffers="^norm")
        run(averaged, wrapped.module, 3)
        kept = dict(averaged.module.named_buffers())
        mean = next(kept[name] for name in kept if name.endswith("running_mean"))
        assert not torch.equal(mean, wrapped.module.norm.running_mean)


@pytest.mark.parametrize("choice", CHOICES, ids=_named)
def test_the_buffers_that_are_copied_are_named(choice: Any) -> None:
    model = nn.DataParallel(conv_net())
    for kind in (ExponentialMovingAverage, AveragedWeights, PowerFunctionEMA):
        told = repr(kind(model, update_buffers=choice))
        assert told.count("  copied_buffers=1: scale\n") == 1
        told = repr(kind(model, update_buffers=choice, exclude=["head", r"conv\.bias"]))
        assert "left_out=3: conv.bias, head.weight, head.bias; copied_buffers=1: scale\n" in told
        for everything in (True, False):
            assert "copied_buffers" not in repr(kind(model, update_buffers=everything))


def test_a_function_is_asked_when_pairs_are_made_alone() -> None:
    asked: list[str] = []

    def choose(name: str, buffer: Tensor) -> bool:
        asked.append(name)
        return False

    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, update_buffers=choose)
    run(averaged, model, 1)
    first = list(asked)
    run(averaged, model, 5)
    assert asked == first
    assert set(asked) == {*STATISTICS, "norm.num_batches_tracked", "scale"}


@pytest.mark.parametrize("choice", CHOICES[:-1], ids=_named)
def test_the_pairing_is_kept(choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pairing] = []
    prepare = Pairing._prepare
    monkeypatch.setattr(Pairing, "_prepare", lambda self: (made.append(self), prepare(self))[1])
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5, update_buffers=choice)
    run(averaged, model, 5)
    assert len(made) == 1


def test_it_may_be_changed_while_training() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.25, update_buffers="running_mean")
    run(averaged, model, 3)
    assert torch.equal(averaged.module.norm.running_var, model.norm.running_var)
    averaged.update_buffers = "running_var"
    run(averaged, model, 1, seed=1)
    assert not torch.equal(averaged.module.norm.running_var, model.norm.running_var)
    assert torch.equal(averaged.module.norm.running_mean, model.norm.running_mean)


@pytest.mark.parametrize("choice", CHOICES, ids=_named)
def test_copies_and_pickles_keep_it(choice: Any) -> None:
    averaged = ExponentialMovingAverage(conv_net(), 0.5, update_buffers=choice)
    for other in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))):
        assert other.avg_parameters.keys() == averaged.avg_parameters.keys()


@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        ("runing", ValueError, "'runing' is found in the name of no buffer that can be averaged"),
        ("num_batches", ValueError, r"there are: scale, norm\.running_mean, norm\.running_var$"),
        ("cache", ValueError, "persistent, floating-point"),
        (["running", "queue"], ValueError, "'queue' is found in the name of no buffer"),
        ("running_(mean", ValueError, r"is no regular expression \(missing \)"),
        ([], TypeError, r"update_buffers is \[\]; a bool, a regular expression, a list of them"),
        ([1], TypeError, "update_buffers: 1 is no pattern"),
        (re.compile(b"running"), TypeError, "is no pattern; a regular expression is expected"),
        (0.5, TypeError, r"update_buffers is 0\.5; a bool, a regular expression"),
    ],
    ids=str,
)
def test_what_chooses_nothing_or_is_no_choice_is_refused(
    choice: Any, error: type[Exception], words: str
) -> None:
    model = conv_net()
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    with pytest.raises(error, match=words):
        ExponentialMovingAverage(model, update_buffers=choice)


def test_a_model_without_buffers_says_so() -> None:
    with pytest.raises(ValueError, match=r"there are: none$"):
        StochasticWeightAverage(nn.Linear(2, 2), update_buffers="running")


@pytest.mark.parametrize(("given", "meant"), [(1, True), (0, False), (None, False)])
def test_other_spellings_of_yes_and_no_still_hold(given: Any, meant: bool) -> None:
    assert ExponentialMovingAverage(conv_net(), update_buffers=given).update_buffers is meant
