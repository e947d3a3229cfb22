"""Several optimizers of one average, several averages of one optimizer, and who keeps whom."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import swa_utils

from ema_fused import AveragedWeights, ExponentialMovingAverage, attach
from ema_fused.averages.real_steps import Rounds
from tests.averages.test_attached_wrappers import SAM, backward, equals, latest, network, sgd

Split = tuple[torch.optim.Optimizer, torch.optim.Optimizer]


def split(model: nn.Module, **options: Any) -> Split:
    """One optimizer for the matrices, one for the vectors."""
    matrices = [one for one in model.parameters() if one.ndim == 2]
    vectors = [one for one in model.parameters() if one.ndim == 1]
    return (
        torch.optim.SGD(matrices, lr=0.1, **options),
        torch.optim.AdamW(vectors, lr=0.1, **options),
    )


@pytest.mark.parametrize("listed", [list, tuple, lambda two: list(reversed(two))])
def test_a_model_split_over_two_optimizers_takes_one_update_a_step(
    listed: Callable[[Split], Any],
) -> None:
    model = network()
    two, averaged = split(model), latest(model)
    by_hand = latest(model)
    attach(listed(two), model, averaged)
    for count in range(1, 5):
        backward(model)
        two[0].step()
        assert averaged.steps == count - 1
        two[1].step()
        by_hand.update_parameters(model)
        assert averaged.steps == count and equals(averaged, model)
    assert by_hand.steps == averaged.steps


def test_a_wrapper_may_be_one_of_them() -> None:
    model = network()
    averaged = latest(model)
    sam = SAM([one for one in model.parameters() if one.ndim == 2])
    other = split(model)[1]
    attach([sam, other], model, averaged)
    for count in range(1, 4):
        backward(model)
        sam.step(lambda: None)
        other.step()
        assert averaged.steps == count and equals(averaged, model)


def test_one_that_steps_less_often_does_not_set_the_pace() -> None:
    """As a generator after every third step of the discriminator."""
    model = network()
    often, seldom = split(model)
    averaged = latest(model)
    with attach([seldom, often], model, averaged):
        for step in range(1, 10):
            backward(model)
            often.step()
            if step % 3 == 0:
                seldom.step()
                assert averaged.steps == step and equals(averaged, model)
            else:
                assert averaged.steps == step - 1, "its round ends before the next step"
        often.step()
    assert averaged.steps == 10 and equals(averaged, model)


def rounds_of(calls: str, count: int = 2) -> list[str]:
    """The rounds that steps make: ``calls`` has a letter for each optimizer that steps."""
    rounds = Rounds(count)
    ended = []
    for letter in calls:
        which = "abc".index(letter)
        ended += [rounds.before(which), rounds.has_stepped(which, None)]
    ended.append(rounds.end())
    return ["".join("abc"[one] for one in found) for found in ended if found]


@pytest.mark.parametrize(
    ("calls", "rounds"),
    [
        ("abab", "ab ab"),
        ("baba", "ba ba"),
        ("ababaab", "ab ab a ab"),  # the second was skipped once: the order is kept
        ("ababbab", "ab ab b ab"),  # the first was skipped once
        ("aaab", "a a ab"),
        ("aaabaaab", "a a ab a a ab"),
        ("b", "b"),
        ("", ""),
    ],
)
def test_a_round_ends_with_its_last_step(calls: str, rounds: str) -> None:
    assert " ".join(rounds_of(calls)) == rounds


def test_rounds_of_three() -> None:
    assert rounds_of("abcabcacbcabc", 3) == ["abc", "abc", "ac", "bc", "abc"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_round_counts_unless_a_scaler_has_skipped_all_of_it(fused: bool) -> None:
    model = network()
    two, averaged = split(model, fused=fused), latest(model)
    attachment = attach(list(two), model, averaged)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counted = 0
    for overflows in ["", "ab", "a", "", "b", "ab", ""]:
        model.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
        for name, optimizer in zip("ab", two, strict=True):
            if name in overflows:
                gradient = optimizer.param_groups[0]["params"][0].grad
                gradient.fill_(torch.inf)
            scaler.step(optimizer)
        scaler.update()
        counted += overflows != "ab"
    attachment.detach()
    assert averaged.state_dict()["steps"] == counted == 5
    assert equals(averaged, model)


def test_offloaded_averages_of_two_optimizers() -> None:
    model = network()
    often, seldom = split(model)
    averaged = ExponentialMovingAverage(model, 0.5, offload="cpu")
    by_hand = ExponentialMovingAverage(model, 0.5)
    with attach([often, seldom], model, averaged):
        for step in range(6):
            backward(model)
            often.step()
            if step % 2:
                seldom.step()
            by_hand.update_parameters(model)
    assert averaged.steps == 6
    pairs = zip(averaged.module.parameters(), by_hand.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_compiled_steps_of_several_optimizers_are_compiled_once() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = network()
    two, averaged = split(model), latest(model)
    attach(list(two), model, averaged)
    compiled = [torch.compile(optimizer.step, backend="eager") for optimizer in two]
    frames = []
    for count in range(1, 5):
        model.zero_grad()
        backward(model)
        for step in compiled:
            step()
        frames.append(counters["frames"]["total"])
        assert averaged.steps == count and equals(averaged, model)
    assert frames[1] == frames[-1]
    torch._dynamo.reset()


def test_an_error_in_between_leaves_the_round_out() -> None:
    model = network()
    two, averaged = split(model), latest(model)
    backward(model)
    with pytest.raises(ZeroDivisionError), attach(list(two), model, averaged):
        two[0].step()
        raise ZeroDivisionError
    assert averaged.steps == 0


def test_a_second_optimizer_is_warned_of_once() -> None:
    model = network()
    two, averaged = split(model), latest(model)
    attach(two[0], model, averaged)
    with pytest.warns(UserWarning, match=r"another optimizer too \(SGD\).*attach\(\[") as caught:
        attach(two[1], model, averaged)
    assert len(caught) == 1 and caught[0].filename == __file__
    backward(model)
    for optimizer in two:
        optimizer.step()
    assert averaged.steps == 2


def test_an_optimizer_that_is_gone_or_detached_is_not_warned_of() -> None:
    model = network()
    averaged = latest(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer = sgd(model)
            attachment = attach(optimizer, model, averaged)
            backward(model)
            optimizer.step()
        attachment.detach()
        other = sgd(model)
        attach(other, model, averaged)
    assert averaged.steps == 3


# ---- Who keeps whom ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [ExponentialMovingAverage, AveragedWeights, swa_utils.AveragedModel]
)
def test_a_cell_that_is_run_again_lets_its_average_go(kind: Callable[[nn.Module], Any]) -> None:
    model = network()
    optimizer = sgd(model)
    living = []
    for _ in range(5):
        averaged = kind(model)
        attach(optimizer, model, averaged)
        living.append(weakref.ref(averaged))
    gc.collect()
    assert [one() is not None for one in living] == [False] * 4 + [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)
        optimizer.step()
    hooks: Any = optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]
    assert len(hooks) <= 2, "what is let go is cleared away by the next attach()"
    steps = averaged.n_averaged if kind is swa_utils.AveragedModel else averaged.steps
    assert steps == 1


def test_what_attach_returns_keeps_no_average() -> None:
    """A notebook keeps what the last line of a cell returned."""
    model = network()
    optimizer = sgd(model)
    attachment = attach(optimizer, model, averaged := latest(model))
    known = weakref.ref(averaged)
    del averaged
    gc.collect()
    assert known() is None
    backward(model)
    optimizer.step()
    attachment.detach()


def test_a_module_that_is_kept_alone_is_told_of_once() -> None:
    model = network()
    optimizer = sgd(model)

    def teacher() -> nn.Module:
        averaged = latest(model)
        attach(optimizer, model, averaged)
        return averaged.module

    kept = teacher()
    gc.collect()
    with pytest.warns(UserWarning, match="is gone and isn't updated any more") as caught:
        for _ in range(3):
            backward(model)
            optimizer.step()
    assert len(caught) == 1
    assert kept is not None


def test_nothing_outlives_the_optimizer_and_the_average() -> None:
    """Without a collection: reference cycles would keep the memory of the model until then."""
    gc.collect()
    gc.disable()
    try:
        model = network()
        two, averaged = split(model), latest(model)
        attach(list(two), model, averaged)
        sam = SAM(model.parameters())
        attach(sam, model, other := latest(model))
        backward(model)
        for optimizer in two:
            optimizer.step()
        sam.step(lambda: None)
        assert averaged.steps == other.steps == 1
        living = [weakref.ref(one) for one in (model, averaged, other, *two, sam)]
        del model, averaged, other, two, sam, optimizer
        assert [type(one()).__name__ for one in living if one() is not None] == []
    finally:
        gc.enable()


def test_model_and_average_may_be_converted_by_swapping_tensors() -> None:
    """Which torch refuses where something refers to a tensor weakly, or to its gradient's node."""
    model = network()
    optimizer, averaged = sgd(model), ExponentialMovingAverage(model, 0.5)
    attach(optimizer, model, averaged)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        averaged.double()
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert next(averaged.parameters()).dtype == next(model.parameters()).dtype == torch.float64


def test_an_attached_model_is_copied_and_pickled_as_ever() -> None:
    model = network()
    optimizer, averaged = sgd(model), latest(model)
    attach(optimizer, model, averaged)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(5):
                backward(other)
                sgd(other).step()
    assert averaged.steps == 0


def test_an_average_without_weak_references_is_kept() -> None:
    class Counting:
        __slots__ = ("updates",)

        def __init__(self) -> None:
            self.updates = 0

        def update_parameters(self, model: nn.Module) -> None:
            self.updates += 1

    model = network()
    optimizer = sgd(model)
    averaged = Counting()
    attach(optimizer, model, averaged)
    optimizer.step()
    assert averaged.updates == 1
