"""torch-ema's average beside ours: within 2 units in the last place at each step."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tests.frameworks.adapters.adapter_cases import (
    DTYPES,
    SLOW,
    assert_next_within_2_ulp,
    no_value_asked_of,
    values,
)
from tests.networks import conv_net, generator, train

theirs = pytest.importorskip("torch_ema", reason="torch-ema is not installed")

from ema_fused.adapters import torch_ema as ours  # noqa: E402

KINDS = {
    "counted": {"decay": 0.97},
    "constant": {"decay": 0.97, "use_num_updates": False},
    "low decay": {"decay": 0.3},
    "none": {"decay": 0.0},
    "all": {"decay": 1.0, "use_num_updates": False},
}


def both(parameters: Any, **arguments: Any) -> tuple[Any, Any]:
    parameters = list(parameters)
    return (
        ours.ExponentialMovingAverage(parameters, **arguments),
        theirs.ExponentialMovingAverage(parameters, **arguments),
    )


def assert_close_for(
    steps: int, model: nn.Module, our: Any, their: Any, *, seed: int = 0, given: bool = False
) -> None:
    random = generator(seed)
    for _ in range(steps):
        train(model, random)
        assert_next_within_2_ulp(
            model, our, their, lambda ema: ema.update(model.parameters() if given else None)
        )
        assert our.num_updates == their.num_updates


@SLOW
@pytest.mark.parametrize("given", [False, True], ids=["remembered", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_each_of_a_hundred_steps_is_within_2_ulp(
    arguments: dict[str, Any], dtype: torch.dtype, given: bool
) -> None:
    model = conv_net(dtype=dtype)
    assert_close_for(100, model, *both(model.parameters(), **arguments), given=given)


def test_a_hundred_steps_end_close_to_theirs() -> None:
    model = conv_net()
    our, their = both(model.parameters(), decay=0.97)
    random = generator()
    for _ in range(100):
        train(model, random)
        our.update()
        their.update()
    for a, b in zip(our.shadow_params, their.shadow_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_average_that_has_arrived_stays_as_theirs_does() -> None:
    """What the way of writing it is good for: nothing is left of equal numbers' difference."""
    model = conv_net()
    our, their = both(model.parameters(), decay=0.97)
    for _ in range(20):
        our.update()
        their.update()
    for ours_now, theirs_now, weight in zip(
        our.shadow_params, their.shadow_params, model.parameters(), strict=True
    ):
        assert torch.equal(ours_now, weight)
        assert torch.equal(theirs_now, weight)


def test_state_is_loaded_both_ways() -> None:
    model = conv_net()
    our, their = both(model.parameters(), decay=0.9)
    assert_close_for(10, model, our, their)
    with torch.no_grad():  # what is stored with gradients can't be loaded
        our.store()
        their.store()
    assert list(our.state_dict()) == list(their.state_dict())
    our_next, their_next = both(model.parameters(), decay=0.5)
    our_next.load_state_dict(their.state_dict())
    their_next.load_state_dict(our.state_dict())
    assert our_next.decay == their_next.decay == 0.9
    assert our_next.num_updates == their_next.num_updates == 10
    assert_close_for(10, model, our_next, their_next, seed=1)


def test_the_rest_is_theirs() -> None:
    model = conv_net()
    our, _ = both(model.parameters(), decay=0.9)
    train(model, generator())
    our.update()
    weights, averages = values(model.parameters()), values(our.shadow_params)
    with our.average_parameters():
        found = values(model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(found, averages, strict=True))
    found = values(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))
    our.to(dtype=torch.float64)
    train(model, generator(1))
    expected = [
        a + (w.double() - a) * (1 - 3 / 12)
        for a, w in zip(our.shadow_params, model.parameters(), strict=True)
    ]
    our.update()
    for a, b in zip(our.shadow_params, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


def test_parameters_are_not_kept_alive() -> None:
    model = conv_net()
    our, _ = both(model.parameters(), decay=0.9)
    our.update()
    reference = weakref.ref(model.conv.weight)
    del model
    gc.collect()
    assert reference() is None
    with pytest.raises(ValueError, match="no longer exists"):
        our.update()
    assert our.num_updates == 1


def test_it_can_be_copied() -> None:
    model = conv_net()
    our, their = both(model.parameters(), decay=0.9)
    assert_close_for(2, model, our, their)
    made, theirs_made = copy.copy(our), copy.copy(their)
    assert vars(made).keys() == vars(theirs_made).keys()
    assert_close_for(2, model, made, theirs_made, given=True)


def test_no_tensor_is_asked_for_its_value() -> None:
    model = conv_net()
    our, _ = both(model.parameters(), decay=0.9)
    with no_value_asked_of():
        our.update()
        our.update(model.parameters())


@pytest.mark.parametrize("count", [1, 3])
def test_lists_of_other_lengths_raise_with_nothing_done(count: int) -> None:
    our, _ = both(nn.Linear(2, 2).parameters(), decay=0.9)
    before = values(our.shadow_params)
    with pytest.raises(ValueError, match="Number of parameters"):
        our.update([nn.Parameter(torch.ones(2, 2))] * count)
    assert our.num_updates == 0
    assert all(torch.equal(a, b) for a, b in zip(our.shadow_params, before, strict=True))


def test_a_mismatch_raises_with_nothing_done_where_theirs_has_begun() -> None:
    model = nn.Linear(2, 2)
    our, their = both(model.parameters(), decay=0.9)
    before = values(our.shadow_params)
    wrong = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"pair 1: .* shape \(2,\) and the source \(3,\)"):
        our.update(wrong)
    with pytest.raises(RuntimeError):
        their.update(wrong)
    assert (our.num_updates, their.num_updates) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(our.shadow_params, before, strict=True))
    assert not torch.equal(their.shadow_params[0], before[0])


def test_integers_follow_where_theirs_raises() -> None:
    parameters = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False),
    ]
    our, their = both(parameters, decay=0.5, use_num_updates=False)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(3)
    with pytest.raises(RuntimeError, match="result type Float can't be cast"):
        their.update()
    our.update()
    assert our.shadow_params[0].tolist() == [1.5, 1.5]
    assert our.shadow_params[1].tolist() == [3, 3]


def test_without_torch_ema_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ema_fused.adapters.torch_ema")
    monkeypatch.setitem(sys.modules, "torch_ema", None)
    with pytest.raises(ImportError, match=r"pip install 'ema_fused\[torch_ema\]'"):
        import ema_fused.adapters.torch_ema  # noqa: F401
