"""Averages of ours under torchtitan's keys, and back; torchtitan itself isn't needed for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ema_fused
from ema_fused import AveragedWeights
from ema_fused.adapters.torchtitan_keys import from_torchtitan, to_torchtitan
from tests.networks import conv_net, generator, snapshot, train


def averaged(updates: int = 3, **options: Any) -> AveragedWeights:
    model = conv_net()
    model.head.requires_grad_(False)
    average = AveragedWeights(model, momentum=0.1, **options)
    random = generator()
    for _ in range(updates):
        train(model, random)
        average.update_parameters(model)
    return average


def test_only_what_is_averaged_is_there() -> None:
    names = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "hidden.weight"]
    keys = to_torchtitan(averaged(share_frozen=True, update_buffers="running_mean")).keys()
    assert keys == {f"state.{name}.ema_params" for name in [*names, "norm.running_mean"]}
    keys = to_torchtitan(averaged()).keys()
    assert keys == {f"state.{n}.ema_params" for n in [*names, "head.weight", "head.bias"]}


def test_there_and_back_all_is_equal_and_the_rest_is_kept() -> None:
    options: dict[str, Any] = {"share_frozen": True, "update_buffers": "running_"}
    one, other = averaged(**options), averaged(updates=1, **options)
    state = {key: tensor.clone() for key, tensor in to_torchtitan(one).items()}
    before = snapshot(other)
    loaded = from_torchtitan({**state, "param_groups.x.lr": 0.1}, other, steps=3)
    assert all(torch.equal(snapshot(other)[name], value) for name, value in before.items())
    other.load_state_dict(loaded)
    assert int(other.steps) == 3
    for key, tensor in to_torchtitan(other).items():
        assert torch.equal(tensor, state[key])
    kept = other.module.state_dict()["norm.num_batches_tracked"]
    assert torch.equal(kept, before["module.norm.num_batches_tracked"])


def test_what_is_left_out_has_no_key_and_is_not_taken() -> None:
    whole, part = averaged(share_frozen=True), averaged(1, share_frozen=True, exclude="conv")
    state = {key: tensor.clone() for key, tensor in to_torchtitan(whole).items()}
    chosen = {key for key in state if "conv" not in key}
    assert to_torchtitan(part).keys() == chosen < state.keys()
    own = part.module.conv.weight.detach().clone()
    part.load_state_dict(from_torchtitan(state, part, steps=3))
    for key, tensor in to_torchtitan(part).items():
        assert torch.equal(tensor, state[key])
    assert torch.equal(part.module.conv.weight, own)
    assert not torch.equal(own, whole.module.conv.weight)
    with pytest.raises(KeyError, match=r"missing: conv\.weight, conv\.bias; unknown: none\. "):
        from_torchtitan(to_torchtitan(part), whole, steps=3)
    with pytest.raises(KeyError, match=r"missing: none; unknown: elsewhere\.weight\. "):
        from_torchtitan({**state, "state.elsewhere.weight.ema_params": own}, part, steps=3)


def test_names_that_do_not_match_are_told() -> None:
    average = averaged(share_frozen=True)
    state = dict(to_torchtitan(average))
    del state["state.conv.bias.ema_params"]
    state["state.elsewhere.weight.ema_params"] = torch.zeros(1)
    with pytest.raises(KeyError, match=r"missing: conv\.bias; unknown: elsewhere\.weight\. "):
        from_torchtitan(state, average, steps=3)
    with pytest.raises(KeyError, match=r"missing: head\.weight, head\.bias; unknown: none\. "):
        from_torchtitan(to_torchtitan(average), averaged(), steps=3)


def test_other_arguments_are_refused() -> None:
    average = averaged()
    state = to_torchtitan(average)
    with pytest.raises(ValueError, match="steps is 0; at least 1 is expected"):
        from_torchtitan(state, average, steps=0)
    copied: Any = ema_fused.ExponentialMovingAverage(conv_net())
    with pytest.raises(TypeError, match=r"ExponentialMovingAverage; an ema_fused\.AveragedWeights"):
        to_torchtitan(copied)
