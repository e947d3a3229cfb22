"""Models compiled by TorchScript, in whole or in part, whose slots are no dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_fused.averages.attaching import attach
from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.engine import backends
from ema_fused.modules.known_model import KnownModel
from ema_fused.modules.watch import ModuleWatch
from tests.networks import differences, generator, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning"),
]

KINDS = pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])


class Normed(nn.Module):
    """Parameters, float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class WithParts(nn.Module):
    """An ordinary model with a scripted and a traced part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.scripted = torch.jit.script(nn.Linear(3, 3))
        self.traced = torch.jit.trace(Normed(), torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.traced(self.scripted(self.first(x)))


def _scripted() -> nn.Module:
    made: nn.Module = torch.jit.script(Normed())
    return made


def _traced() -> nn.Module:
    made: nn.Module = torch.jit.trace(Normed(), torch.ones(4, 3))
    return made


MODELS = pytest.mark.parametrize("build", [_scripted, _traced, WithParts])


@pytest.fixture(params=["as it is built", "pure Python"], autouse=True)
def extension(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure Python":
        monkeypatch.setattr(backends, "_native", None)


@torch.no_grad()
def _step(model: nn.Module, random: torch.Generator) -> None:
    """Moves every weight: a forward pass would compile the model for a second."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=random))


@pytest.mark.parametrize("build", [_scripted, WithParts])
@KINDS
@pytest.mark.parametrize(
    "options",
    [{}, {"averaged_dtype": torch.float64}, {"share_frozen": True}, {"offload": "cpu"}],
    ids=str,
)
def test_averages_are_torchs(
    kind: type[ExponentialMovingAverage], build: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    random, model = generator(), build()
    averaged = kind(model, 0.1, **options)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(4):
        _step(model, random)
        averaged.update_parameters(model)
        reference.update_parameters(model)
    reference.module.load_state_dict(
        {**model.state_dict(), **dict(reference.module.named_parameters())}
    )
    ours, theirs = averaged.module.state_dict(), reference.module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.to(theirs[name].dtype), theirs[name])
    before = snapshot(model)
    with averaged.swapped(model):
        for name, tensor in dict(model.named_parameters()).items():
            torch.testing.assert_close(tensor, theirs[name])
    assert differences(snapshot(model), before) == []


@MODELS
def test_the_copy_is_called_saved_loaded_and_written_back(build: Callable[[], nn.Module]) -> None:
    random, model = generator(), build()
    averaged = ExponentialMovingAverage(model, 0.1)
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    for _ in range(2):
        _step(model, random)
        averaged.update_parameters(model)
    again = ExponentialMovingAverage(build(), 0.1)
    again.load_state_dict(averaged.state_dict())
    averaged.copy_to(model)
    x = torch.randn(4, 3, generator=random)
    for one in (averaged, again, model):
        one.eval()
    assert torch.equal(averaged(x), model(x)) and torch.equal(again(x), model(x))


@MODELS
@KINDS
def test_saving_is_refused_while_swapped(
    kind: type[ExponentialMovingAverage], build: Callable[[], nn.Module]
) -> None:
    model = build()
    state = model.state_dict()
    averaged = kind(model, 0.1)
    averaged.update_parameters(model)
    with averaged.swapped(model):
        for saved in (model, averaged):
            with pytest.raises(RuntimeError, match=r"state_dict\(\) was called while averaged"):
                saved.state_dict()
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\) was called while averaged"):
            model.load_state_dict(state)
    model.load_state_dict(model.state_dict())


@MODELS
def test_replaced_parameters_are_noticed(build: Callable[[], nn.Module]) -> None:
    model = build()
    part: Any = model.scripted if isinstance(model, WithParts) else model.linear
    averaged = AveragedWeights(model, 0.5)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    part.weight = nn.Parameter(torch.full((3, 3), 7.0))
    before = {name: tensor.clone() for name, tensor in averaged.weights.items()}
    averaged.update_parameters(model)
    name = "scripted.weight" if isinstance(model, WithParts) else "linear.weight"
    assert torch.equal(averaged.weights[name], torch.lerp(before[name], part.weight, 0.5))


@MODELS
def test_attached_averages_follow(build: Callable[[], nn.Module]) -> None:
    random, model = generator(), build()
    averaged = AveragedWeights(model, 0.5, offload="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, averaged):
        for _ in range(3):
            _step(model, random)
            optimizer.step()
    assert averaged.steps == 3
    model.load_state_dict(model.state_dict())


def test_the_rest_of_the_model_is_watched_by_the_extension() -> None:
    model = WithParts()
    watch = ModuleWatch(model)
    assert watch.slots is None and not watch.changed()
    assert KnownModel(model, lambda _: None).is_now(model)
    model.first.bias = nn.Parameter(torch.zeros(3))
    assert watch.changed()
    watch = ModuleWatch(model)
    model.scripted.bias = nn.Parameter(torch.zeros(3))
    assert watch.changed()


class _OneByOne(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        averaged_param.lerp_(source_param, 0.5)


@MODELS
def test_averages_of_a_class_with_its_own_function(build: Callable[[], nn.Module]) -> None:
    random, model = generator(), build()
    averaged, reference = _OneByOne(model), ExponentialMovingAverage(model, 0.5)
    for _ in range(3):
        _step(model, random)
        averaged.update_parameters(model)
        reference.update_parameters(model)
    assert differences(snapshot(averaged.module), snapshot(reference.module)) == []
