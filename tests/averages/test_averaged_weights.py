"""Averaged tensors without a copy of the module: the same as with one, and what is left out."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel

from ema_fused import (
    AveragedWeights,
    BaseAveragedModel,
    ExponentialMovingAverage,
    StochasticWeightAverage,
)
from ema_fused.averages import schedules
from tests.networks import (
    CPU_BACKENDS,
    Cached,
    Tied,
    conv_net,
    differences,
    generator,
    run,
    snapshot,
    train,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffers": {"update_buffers": True},
    "double": {"averaged_dtype": torch.float64},
    "interval": {"interval": 3},
    "waiting": {"begin_step": 4},
    "every": {"every": 3},
    "schedule": {"momentum": partial(schedules.annealing, momentum=0.05, gamma=3)},
    "random": {"rounding": "stochastic", "seed": 3},
}


def both(model: nn.Module, **options: Any) -> tuple[AveragedWeights, ExponentialMovingAverage]:
    options = {"momentum": 0.1, **options}
    return AveragedWeights(model, **options), ExponentialMovingAverage(model, **options)


def stay_equal(averaged: BaseAveragedModel, copied: BaseAveragedModel, model: nn.Module) -> None:
    """Trains ``model``; the states of both averages are equal to the bit after every update."""
    random = generator()
    for _ in range(10):
        train(model, random)
        averaged.update_parameters(model)
        copied.update_parameters(model)
        assert differences(dict(averaged.state_dict()), dict(copied.state_dict())) == []


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_averages_as_the_model_that_is_copied(name: str, backend: str | None) -> None:
    dtype = torch.bfloat16 if name == "random" else torch.float32
    model = conv_net(dtype=dtype)
    averaged, copied = both(model, backend=backend, **OPTIONS[name])
    stay_equal(averaged, copied, model)
    assert differences(averaged.weights, dict(copied.module.state_dict())) == []


def test_the_mean_of_stochastic_weight_averaging() -> None:
    model = conv_net()
    averaged = AveragedWeights(model, schedules.mean, arithmetic="delta")
    copied = StochasticWeightAverage(model)
    stay_equal(averaged, copied, model)


def test_checkpoints_of_both_kinds_are_exchanged() -> None:
    model = conv_net()
    averaged, copied = both(model)
    run(averaged, model, 3)
    copied.load_state_dict(averaged.state_dict())
    assert copied.steps == 3
    run(copied, model, 2)
    averaged.load_state_dict(copied.state_dict())
    assert averaged.steps == 5
    assert differences(dict(averaged.state_dict()), dict(copied.state_dict())) == []


@pytest.mark.parametrize(
    "wrapped",
    [
        torch.compile,
        DataParallel,
        checkpoint_wrapper,
        lambda model: DataParallel(checkpoint_wrapper(torch.compile(model))),
    ],
    ids=["compile", "parallel", "checkpointing", "all"],
)
def test_names_are_those_of_the_plain_model(wrapped: Any) -> None:
    model = conv_net()
    averaged, _ = both(wrapped(model))
    assert list(averaged.weights) == list(model.state_dict())
    run(averaged, wrapped(model), 2)
    with averaged.swapped(model):
        pass
    part = nn.Sequential(wrapped(nn.Linear(2, 2)))
    assert list(AveragedWeights(part).weights) == ["0.weight", "0.bias"]


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    averaged = AveragedWeights(model)
    assert list(averaged.weights) == ["module.weight", "module.bias"]
    averaged.update_parameters(model)


def test_averages_are_swapped_in_and_written() -> None:
    model = conv_net().eval()
    averaged, copied = both(model)
    run(averaged, model, 4)
    copied.load_state_dict(averaged.state_dict())
    images = torch.randn(2, 1, 8, 8, generator=generator())
    before = snapshot(model)
    with torch.no_grad():
        with averaged.swapped(model) as evaluated:
            found = evaluated(images)
        assert torch.equal(found, copied.eval()(images))
        assert differences(before, snapshot(model)) == []
        averaged.copy_to(model)
        assert torch.equal(model(images), found)


def test_a_compiled_model_runs_on_its_averages() -> None:
    model = conv_net().eval()
    compiled = torch.compile(model, backend="eager")
    averaged = AveragedWeights(compiled, 0.1)
    run(averaged, compiled, 4)
    plain = conv_net().eval()
    averaged.copy_to(plain)
    images = torch.randn(2, 1, 8, 8, generator=generator())
    with torch.no_grad():
        own = compiled(images)
        with averaged.swapped(compiled):
            assert torch.equal(compiled(images), plain(images))
        assert torch.equal(compiled(images), own)


def test_it_cannot_be_called() -> None:
    averaged = AveragedWeights(conv_net())
    with pytest.raises(TypeError, match=r"tensors alone.*averaged.swapped\(model\)"):
        averaged(torch.zeros(1, 1, 8, 8))


class Uncopied(nn.Module):
    """A model that refuses to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
        raise TypeError("not me")


def test_a_model_that_cannot_be_copied() -> None:
    model = Uncopied()
    averaged = AveragedWeights(model, 0.5)
    run(averaged, model, 3)
    assert averaged.steps == 3
    again = copy.deepcopy(averaged)
    assert differences(dict(again.state_dict()), dict(averaged.state_dict())) == []
    assert pickle.loads(pickle.dumps(averaged)).steps == 3


def test_tied_tensors_are_tied() -> None:
    model = Tied()
    averaged = AveragedWeights(model, 0.5)
    run(averaged, model, 3)
    weights = averaged.weights
    assert weights["encoder.weight"].data_ptr() == weights["decoder.weight"].data_ptr()
    assert sum(1 for _ in averaged.parameters()) == 1


def test_caches_are_in_no_state() -> None:
    averaged = AveragedWeights(Cached())
    assert list(averaged.weights) == ["layer.weight", "layer.bias"]


# What is frozen.


def adapted() -> nn.Module:
    """A frozen layer beside a small one that trains."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2, bias=False))
    model[0].requires_grad_(False)
    return model


def test_what_is_frozen_is_shared_and_in_no_checkpoint() -> None:
    model = adapted()
    averaged = AveragedWeights(model, 0.5, share_frozen=True)
    for name in ("0.weight", "0.bias"):
        assert averaged.weights[name].data_ptr() == model.get_parameter(name).data_ptr()
    assert list(averaged.state_dict()) == ["steps", "module.1.weight"]
    run(averaged, model, 3)
    fresh = AveragedWeights(model, 0.5, share_frozen=True)
    fresh.load_state_dict(averaged.state_dict())
    assert fresh.steps == 3
    assert torch.equal(fresh.weights["1.weight"], averaged.weights["1.weight"])


def test_a_checkpoint_with_what_has_been_trained_since_ends_the_sharing() -> None:
    model = adapted()
    averaged = AveragedWeights(model, 0.5, share_frozen=True)
    averaged.update_parameters(model)
    model.requires_grad_(True)
    run(averaged, model, 3)
    state = copy.deepcopy(averaged.state_dict())
    assert "module.0.weight" in state
    resumed = adapted()
    own = resumed[0].weight.detach().clone()
    fresh = AveragedWeights(resumed, 0.5, share_frozen=True)
    fresh.load_state_dict(state)
    assert differences(dict(fresh.state_dict()), state) == []
    assert torch.equal(resumed[0].weight, own), "the average was written into the model"


def test_what_trains_from_now_on_and_is_in_no_checkpoint_is_missing() -> None:
    model = adapted()
    state = AveragedWeights(model, share_frozen=True).state_dict()
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"Missing key.*module.0.weight"):
        AveragedWeights(model, share_frozen=True).load_state_dict(state)


# Memory.


def bytes_held(module: nn.Module, *others: nn.Module) -> int:
    """Bytes of distinct storages that the others don't hold."""

    def storages(root: nn.Module) -> dict[int, int]:
        tensors = [*root.parameters(), *root.buffers()]
        return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}

    theirs = {pointer for other in others for pointer in storages(other)}
    return sum(size for pointer, size in storages(module).items() if pointer not in theirs)


def test_it_holds_the_bytes_that_are_promised() -> None:
    model = nn.Linear(1000, 100, bias=False).to(torch.bfloat16)
    count = model.weight.numel()
    steps = 8
    for options, expected in (
        ({}, 2 * count),
        ({"averaged_dtype": torch.float32}, 4 * count),
        ({"averaged_dtype": torch.bfloat16}, 2 * count),
    ):
        assert bytes_held(AveragedWeights(model, **options), model) == expected + steps
    model.requires_grad_(False)
    assert bytes_held(AveragedWeights(model, share_frozen=True), model) == steps


# Models without memory yet.


@pytest.mark.parametrize("kind", [AveragedWeights, ExponentialMovingAverage])
def test_a_model_on_the_meta_device_gets_its_average_with_its_memory(kind: Any) -> None:
    with torch.device("meta"):
        model = conv_net()
        model.head.weight = model.hidden.weight  # tied, of no matter what shape
    averaged = kind(model, 0.5, averaged_dtype=torch.float64)
    with pytest.raises(ValueError, match="meta device"):
        averaged.update_parameters(model)
    model.to_empty(device="cpu")
    model.head.weight = model.hidden.weight
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(4)
    averaged.update_parameters(model)
    for tensor in model.parameters():
        tensor.detach().fill_(8)
    averaged.update_parameters(model)
    for name, parameter in averaged.module.named_parameters():
        assert parameter.dtype == torch.float64
        assert parameter.eq(6).all(), name
    assert averaged.module.head.weight is averaged.module.hidden.weight
    assert averaged.module.norm.running_mean.eq(4).all()


def test_what_is_frozen_without_memory_is_shared_once_it_has_some() -> None:
    with torch.device("meta"):
        model = adapted()
    averaged = AveragedWeights(model, 0.5, share_frozen=True)
    model.to_empty(device="cpu")
    run(averaged, model, 2)
    for name in ("0.weight", "0.bias"):
        assert averaged.weights[name].data_ptr() == model.get_parameter(name).data_ptr()
    own = averaged.weights["1.weight"]
    assert own.data_ptr() != model.get_parameter("1.weight").data_ptr()
    assert list(averaged.state_dict()) == ["steps", "module.1.weight"]


def test_what_is_frozen_stays_shared_where_it_is_moved() -> None:
    model = adapted()
    averaged = AveragedWeights(model, 0.5, share_frozen=True)
    run(averaged, model, 2)
    frozen = model.get_parameter("0.weight")
    frozen.data = frozen.data.clone()
    run(averaged, model, 1)
    assert averaged.weights["0.weight"].data_ptr() == frozen.data_ptr()


def test_values_are_not_loaded_into_no_memory() -> None:
    with torch.device("meta"):
        model = conv_net()
    averaged = AveragedWeights(model)
    state = AveragedWeights(conv_net()).state_dict()
    with pytest.raises(RuntimeError, match=r"'.*' of .* meta .*averaged.copy_from\(model\)"):
        averaged.load_state_dict(state)


# Options.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every is 0; at least 1"),
        ({"every": 2.5}, TypeError, "every is 2.5; an integer"),
        ({"every": 2, "interval": 2}, ValueError, "interval=2 with every=2"),
        ({"offload": "disk"}, ValueError, "offload is 'disk'; None or 'cpu'"),
        ({"offload": "cpu", "interval": 2}, ValueError, "skip whole calls by every="),
        ({"offload": "cpu", "overlap": True}, ValueError, "leave overlap out"),
        ({"capturable": True, "every": 2}, ValueError, "a CUDA graph replays"),
        ({"capturable": True, "offload": "cpu"}, ValueError, "a CUDA graph replays"),
        ({"capturable": True, "distance_every": 2}, ValueError, "squared_distance"),
        ({"distance_every": 0}, ValueError, "distance_every is 0"),
        ({"arithmetic": "mean"}, ValueError, "arithmetic 'mean' is none of lerp"),
        ({"averaged_dtype": torch.int64}, ValueError, "floating-point dtype"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AveragedWeights(conv_net(), **options)


@pytest.mark.parametrize(
    "options", [{"every": 2}, {"offload": "cpu"}, {"overlap": True}, {"capturable": True}]
)
def test_averages_one_by_one_cannot_do_it(options: dict[str, Any]) -> None:
    class OneByOne(BaseAveragedModel):
        def avg_func(self, averaged_param: Any, source_param: Any, steps: Any) -> None:
            averaged_param.copy_(source_param)

    with pytest.raises(ValueError, match=f"its own avg_func.*{next(iter(options))}"):
        OneByOne(conv_net(), **options)


# Every n-th call for all of them.


@pytest.mark.parametrize("every", [2, 3, 5])
def test_every_forgets_as_fast_as_each_call_would(every: int) -> None:
    """Of weights that stay as they are after the first call, both are equally far away then."""
    model = nn.Linear(3, 3, dtype=torch.float64)
    momentum = partial(schedules.annealing, momentum=0.01, gamma=20)
    each, some = AveragedWeights(model, momentum), AveragedWeights(model, momentum, every=every)
    for step in range(1 + 4 * every):
        if step == 1:
            train(model, generator())
        each.update_parameters(model)
        some.update_parameters(model)
        if step % every == 0:
            for name, tensor in each.weights.items():
                assert torch.allclose(tensor, some.weights[name], rtol=1e-12, atol=0)
    assert some.steps == each.steps == 1 + 4 * every


def test_the_calls_between_do_nothing() -> None:
    model = conv_net()
    averaged = AveragedWeights(model, 0.5, every=3)
    random = generator()
    averaged.update_parameters(model)
    before = {name: tensor.clone() for name, tensor in averaged.weights.items()}
    for _ in range(2):
        train(model, random)
        averaged.update_parameters(model)
        assert differences(before, averaged.weights) == []
    train(model, random)
    averaged.update_parameters(model)
    assert differences(before, averaged.weights) != []
    assert averaged.weights["norm.num_batches_tracked"] == model.norm.num_batches_tracked


def test_calls_that_wait_for_the_beginning_copy_whatever_every_is() -> None:
    model = conv_net()
    averaged = AveragedWeights(model, 0.5, every=3, begin_step=5)
    random = generator()
    for _ in range(4):
        train(model, random)
        averaged.update_parameters(model)
        assert differences(averaged.weights, dict(model.state_dict())) == []


def test_overlap_without_a_device_says_so_once() -> None:
    model = conv_net()
    averaged = AveragedWeights(model, overlap=True)
    with pytest.warns(match="overlap=True has no effect.*cpu") as caught:
        run(averaged, model, 3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(averaged, model, 3)
