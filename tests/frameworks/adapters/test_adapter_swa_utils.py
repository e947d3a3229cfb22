"""torch's AveragedModel beside ours: the same to the bit, but for what is better."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

from ema_fused.adapters import swa_utils as ours
from ema_fused.adapters.following import notes_of
from tests.frameworks.adapters.adapter_cases import (
    DTYPES,
    assert_freed,
    assert_within_2_ulp,
    no_value_asked_of,
    without_integers,
)
from tests.networks import Cached, Tied, conv_net, differences, generator, snapshot, train

MADE = {
    "ema": lambda module: module.get_ema_multi_avg_fn(0.97),
    "low decay": lambda module: module.get_ema_multi_avg_fn(0.3),
    "swa": lambda module: module.get_swa_multi_avg_fn(),
}


def both(model: nn.Module, **arguments: Any) -> tuple[Any, Any]:
    return ours.AveragedModel(model, **arguments), theirs.AveragedModel(model, **arguments)


def assert_equal_for(steps: int, model: nn.Module, our: Any, their: Any, seed: int = 0) -> None:
    random = generator(seed)
    for step in range(steps):
        train(model, random)
        our.update_parameters(model)
        their.update_parameters(model)
        assert differences(snapshot(our), snapshot(their)) == [], f"after call {step}"


@pytest.mark.parametrize("functions", [ours, theirs], ids=["our function", "torch's function"])
@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("made", MADE)
def test_a_hundred_steps_are_equal_to_the_bit(
    made: str, dtype: torch.dtype, use_buffers: bool, functions: Any
) -> None:
    model = without_integers(dtype)
    our = ours.AveragedModel(model, multi_avg_fn=MADE[made](functions), use_buffers=use_buffers)
    their = theirs.AveragedModel(model, multi_avg_fn=MADE[made](theirs), use_buffers=use_buffers)
    assert_equal_for(100, model, our, their)


@pytest.mark.parametrize("made", MADE)
def test_our_functions_in_torchs_class_are_equal_to_the_bit(made: str) -> None:
    model = without_integers()
    our, their = (
        theirs.AveragedModel(model, multi_avg_fn=MADE[made](functions), use_buffers=True)
        for functions in (ours, theirs)
    )
    assert_equal_for(100, model, our, their)


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [0.97, 0.5, 0.3])
def test_torchs_function_for_one_tensor_is_planned_and_equal_to_the_bit(
    decay: float, dtype: torch.dtype, use_buffers: bool
) -> None:
    if decay < 0.5 and dtype == torch.float64:
        decay = 0.25  # of others, 1 - (1 - decay) has another last bit
    function = theirs.get_ema_avg_fn(decay)
    model = without_integers(dtype)
    our, their = both(model, avg_fn=function, use_buffers=use_buffers)
    assert_equal_for(100, model, our, their)
    assert "pairing" in notes_of(our)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
def test_the_mean_is_within_2_ulp_of_torchs_which_divides(
    use_buffers: bool, dtype: torch.dtype
) -> None:
    model = without_integers(dtype)
    our, their = both(model, use_buffers=use_buffers)
    random = generator()
    for _ in range(100):
        train(model, random)
        our.load_state_dict(their.state_dict())
        before = [tensor.clone() for tensor in their.module.state_dict().values()]
        our.update_parameters(model)
        their.update_parameters(model)
        assert our.n_averaged == their.n_averaged
        found, expected, source = (
            m.state_dict().values() for m in (our.module, their.module, model)
        )
        assert_within_2_ulp(list(found), list(expected), before, list(source))


def test_the_mean_of_float64_is_that_of_all_values() -> None:
    model = nn.Linear(3, 3).double()
    our = ours.AveragedModel(model)
    random, values = generator(), []
    for _ in range(100):
        train(model, random)
        values.append(model.weight.detach().clone())
        our.update_parameters(model)
    torch.testing.assert_close(our.module.weight, torch.stack(values).mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
def test_checkpoints_continue_both_ways(use_buffers: bool) -> None:
    model = without_integers()
    arguments = {"multi_avg_fn": theirs.get_ema_multi_avg_fn(0.9), "use_buffers": use_buffers}
    our, their = both(model, **arguments)
    assert list(our.state_dict()) == list(their.state_dict())
    assert_equal_for(20, model, our, their)
    our_next, their_next = both(without_integers(), **arguments)
    our_next.load_state_dict(their.state_dict())
    their_next.load_state_dict(our.state_dict())
    assert_equal_for(20, model, our_next, their_next, seed=1)


def test_writing_n_averaged_counts() -> None:
    model = without_integers()
    our, their = both(model, multi_avg_fn=theirs.get_swa_multi_avg_fn())
    assert_equal_for(3, model, our, their)
    for averaged in (our, their):
        averaged.n_averaged.fill_(7)
    assert_equal_for(3, model, our, their)
    for averaged in (our, their):
        averaged.n_averaged = torch.tensor(0)
    assert_equal_for(3, model, our, their)
    assert our.n_averaged == 3


def one_by_one(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
    return averaged + (current - averaged) * 0.5 / (num_averaged + 1)


@functools.wraps(theirs.get_ema_multi_avg_fn(0.5))
def under_torchs_name(averaged: Any, current: Any, num_averaged: Any) -> None:
    torch._foreach_lerp_(averaged, current, 0.125)


class Callable:
    """Neither a function nor hashable."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        torch._foreach_lerp_(averaged, current, 0.25)


@pytest.mark.parametrize(
    "arguments",
    [
        {"avg_fn": one_by_one},
        {"avg_fn": theirs.get_swa_avg_fn()},
        {"multi_avg_fn": under_torchs_name},
        {"multi_avg_fn": Callable()},
        {"multi_avg_fn": functools.partial(Callable())},
    ],
    ids=["avg_fn", "torch's avg_fn", "wraps", "callable", "partial"],
)
def test_functions_of_others_run_as_in_torch(arguments: dict[str, Any]) -> None:
    model = without_integers()
    assert_equal_for(20, model, *both(model, **arguments))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_wrapped_and_scripted_models_are_the_same_model() -> None:
    fn = theirs.get_ema_multi_avg_fn(0.9)
    model = without_integers()
    our, their = both(model, multi_avg_fn=fn)
    for wrapped in (nn.DataParallel(model), torch.compile(model), nn.Sequential(model)[0]):
        assert_equal_for(5, wrapped, our, their)  # type: ignore[arg-type]
    scripted = torch.jit.script(nn.Linear(3, 2))
    assert_equal_for(5, scripted, *both(scripted, multi_avg_fn=fn))


def test_copies_and_pickles_go_on_equally() -> None:
    model = without_integers()
    our, their = both(model)
    for averaged in (our, their):
        averaged.update_parameters(model)
    results: list[dict[str, Tensor]] = []
    trained = copy.deepcopy(model)
    for made in (copy.deepcopy(our), pickle.loads(pickle.dumps(our)), our):
        assert vars(made).keys() == vars(their).keys()
        assert made.n_averaged == 1
        random, current = generator(), copy.deepcopy(trained)
        for _ in range(5):
            train(current, random)
            made.update_parameters(current)
        results.append(snapshot(made))
    assert differences(results[0], results[2]) == []
    assert differences(results[1], results[2]) == []


def test_no_tensor_is_asked_for_its_value_where_theirs_is() -> None:
    model = conv_net()
    our, their = both(model)
    our.update_parameters(model)
    with no_value_asked_of():
        for _ in range(4):
            our.update_parameters(model)
        with pytest.raises(AssertionError, match="asked for its value"):
            their.update_parameters(model)
    assert our.n_averaged == 5


def test_replaced_and_converted_parameters_are_followed() -> None:
    model = nn.Linear(2, 2)
    our, their = both(model, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.5))
    assert_equal_for(2, model, our, their)
    model.weight = nn.Parameter(torch.ones(2, 2))
    assert_equal_for(2, model, our, their)
    model.weight.data = torch.zeros(2, 2)
    assert_equal_for(2, model, our, their)
    for module in (model, our, their):
        module.double()
    assert_equal_for(2, model, our, their)
    for averaged in (our, their):
        averaged.module.load_state_dict(nn.Linear(2, 2).double().state_dict(), assign=True)
    their.load_state_dict(our.state_dict())
    assert_equal_for(2, model, our, their)


def test_a_deleted_model_is_freed_and_another_may_follow() -> None:
    averaged = ours.AveragedModel(nn.Linear(2, 2))

    def delete() -> weakref.ref[Any]:
        model = nn.Linear(2, 2)
        averaged.update_parameters(model)
        return weakref.ref(model.weight)

    assert_freed(delete)
    averaged.update_parameters(nn.Linear(2, 2))

    model = nn.Linear(2, 2)

    def delete_average() -> weakref.ref[Any]:
        averaged = ours.AveragedModel(model)
        averaged.update_parameters(model)
        return weakref.ref(averaged)

    assert_freed(delete_average)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (nn.Linear(2, 3, bias=False), KeyError, "missing from the model: bias"),
        (nn.Linear(3, 2), ValueError, "'weight' has shape"),
        (nn.Linear(2, 2, dtype=torch.complex64), TypeError, "'weight' is torch.float32"),
    ],
    ids=["name", "shape", "dtype"],
)
def test_what_does_not_match_raises_with_nothing_done(
    other: nn.Module, error: type[Exception], message: str
) -> None:
    model = nn.Linear(2, 2)
    our = ours.AveragedModel(model)
    our.update_parameters(model)
    before = snapshot(our)
    with pytest.raises(error, match=message):
        our.update_parameters(other)
    assert differences(snapshot(our), before) == []


# What is different on purpose: first the original's behaviour, then ours.


def test_a_float32_average_of_a_bfloat16_model_where_theirs_raises() -> None:
    for made in MADE.values():
        model = nn.Linear(4, 4, bias=False).bfloat16()
        our, their = both(model, multi_avg_fn=made(theirs))
        for averaged in (our, their):
            averaged.module.float()
            averaged.update_parameters(model)
        before = our.module.weight.detach().clone()
        train(model, generator())
        with pytest.raises(RuntimeError, match="dtype"):
            their.update_parameters(model)
        our.update_parameters(model)
        weight = {0.97: 1 - 0.97, 0.3: 0.7}.get(_decay(made), 0.5)
        assert torch.equal(our.module.weight, torch.lerp(before, model.weight.float(), weight))


def _decay(made: Any) -> float | None:
    function = made(ours)
    cells = function.__closure__
    return None if cells is None else float(cells[0].cell_contents)


def test_integer_buffers_are_current_where_theirs_are_cut_off_or_raise() -> None:
    model = conv_net()
    ema, their_ema = both(model, use_buffers=True, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.5))
    swa, their_swa = both(model, use_buffers=True, multi_avg_fn=theirs.get_swa_multi_avg_fn())
    for count in (1, 4):
        model.norm.num_batches_tracked.fill_(count)
        for averaged in (ema, their_ema, swa):
            averaged.update_parameters(model)
        if count == 1:
            their_swa.update_parameters(model)
    with pytest.raises(RuntimeError, match="addcdiv"):
        their_swa.update_parameters(model)
    assert their_ema.module.norm.num_batches_tracked == 2  # 2.5
    assert ema.module.norm.num_batches_tracked == swa.module.norm.num_batches_tracked == 4


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
def test_non_persistent_buffers_are_as_the_others(use_buffers: bool) -> None:
    model = Cached()
    our, their = both(model, use_buffers=use_buffers, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.5))
    assert_equal_for(3, model, our, their)
    assert torch.equal(our.module.cache, model.cache) != use_buffers


def test_tied_weights_are_averaged_once() -> None:
    model = Tied()
    assert_equal_for(3, model, *both(model, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.5)))


def test_integers_in_lists_follow_where_torchs_function_raises() -> None:
    averaged, current = [torch.tensor([1])], [torch.tensor([4])]
    with pytest.raises(RuntimeError, match="addcdiv"):
        theirs.get_swa_multi_avg_fn()(averaged, current, torch.tensor(1))
    ours.get_swa_multi_avg_fn()(averaged, current, torch.tensor(1))
    assert averaged[0].tolist() == [4]


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range_raises(decay: float) -> None:
    with pytest.raises(ValueError, match="decay is"):
        ours.get_ema_multi_avg_fn(decay)
