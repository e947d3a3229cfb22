"""Sparse buffers (the adjacency of a graph) are carried along: copied, swapped, saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ema_fused.adapters.swa_utils import AveragedModel
from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.base import BaseAveragedModel
from ema_fused.averages.kinds import ExponentialMovingAverage, StochasticWeightAverage
from ema_fused.engine import backends
from ema_fused.engine.plan import Plan
from ema_fused.posthoc.power_function import PowerFunctionEMA
from tests.networks import generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "COO": Tensor.to_sparse,
    "CSR": Tensor.to_sparse_csr,
    "CSC": Tensor.to_sparse_csc,
    "BSR": lambda dense: dense.to_sparse_bsr((2, 2)),
}
EACH = pytest.mark.parametrize("layout", LAYOUTS)


def _dense(random: torch.Generator) -> Tensor:
    return (torch.rand(4, 4, generator=random) > 0.5).float()


class Graph(nn.Module):
    def __init__(self, layout: str, *, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        adjacency = LAYOUTS[layout](_dense(generator()))
        self.register_buffer("adjacency", adjacency, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, self.linear(x))


KINDS: list[Any] = [
    pytest.param(ExponentialMovingAverage, {"momentum": 0.1}, id="EMA"),
    pytest.param(ExponentialMovingAverage, {"momentum": 0.1, "update_buffers": True}, id="buffers"),
    pytest.param(
        ExponentialMovingAverage, {"momentum": 0.1, "averaged_dtype": torch.float64}, id="float64"
    ),
    pytest.param(StochasticWeightAverage, {"interval": 2}, id="SWA"),
    pytest.param(AveragedWeights, {"momentum": 0.1}, id="weights"),
    pytest.param(AveragedWeights, {"momentum": 0.1, "offload": "cpu"}, id="offloaded"),
]


@EACH
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_an_average_follows_a_sparse_buffer(
    kind: type[BaseAveragedModel], options: dict[str, Any], layout: str, persistent: bool
) -> None:
    model, random = Graph(layout, persistent=persistent), generator(1)
    averaged = kind(model, **options)
    module: Any = averaged.module
    for _ in range(4):
        averaged.update_parameters(model)
        assert torch.equal(module.adjacency.to_dense(), model.adjacency.to_dense())
        assert module.adjacency.values().data_ptr() != model.adjacency.values().data_ptr()
        assert module.adjacency.layout == model.adjacency.layout
        model.adjacency = LAYOUTS[layout](_dense(random))  # of another pattern
    own, its_average = model.adjacency.to_dense(), module.adjacency.to_dense()
    assert not torch.equal(own, its_average)
    with averaged.swapped(model):
        assert torch.equal(model.adjacency.to_dense(), its_average)
    assert torch.equal(model.adjacency.to_dense(), own)
    assert torch.equal(module.adjacency.to_dense(), its_average)
    averaged.load_state_dict(averaged.state_dict())
    averaged.copy_to(model)
    assert torch.equal(model.adjacency.to_dense(), its_average)


@EACH
def test_power_functions_follow_it_too(layout: str) -> None:
    model, random = Graph(layout), generator(1)
    averaged = PowerFunctionEMA(model)
    for _ in range(3):
        averaged.update_parameters(model)
        for one in (0.05, 0.1):
            kept = averaged.average(one)["adjacency"]
            assert torch.equal(kept.to_dense(), model.adjacency.to_dense())
        model.adjacency = LAYOUTS[layout](_dense(random))
    averaged.copy_to(model, sigma_rel=0.1)
    assert torch.equal(model.adjacency.to_dense(), kept.to_dense())


def test_torchs_average_and_ours_agree() -> None:
    model = Graph("COO")
    function = swa_utils.get_ema_multi_avg_fn(0.9)
    our, their = (
        cls(model, multi_avg_fn=function) for cls in (AveragedModel, swa_utils.AveragedModel)
    )
    x = torch.rand(4, 4)
    for _ in range(3):
        with torch.no_grad():
            model.linear.weight.add_(1.0)
        our.update_parameters(model)
        their.update_parameters(model)
        assert torch.equal(our(x), their(x))


def test_without_the_extension_they_are_carried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_native", None)
    model = Graph("COO")
    averaged = AveragedWeights(model, 0.1, backend="foreach")
    averaged.update_parameters(model)
    model.adjacency = LAYOUTS["COO"](_dense(generator(1)))
    averaged.update_parameters(model)
    assert torch.equal(averaged.weights["adjacency"].to_dense(), model.adjacency.to_dense())


# Plans.


def _pair(layout: str) -> tuple[Tensor, Tensor]:
    one, other = (LAYOUTS[layout](_dense(generator(seed))) for seed in (1, 2))
    return one, other


@EACH
def test_plans_copy_them_without_a_warning(layout: str, recwarn: pytest.WarningsRecorder) -> None:
    averaged, source = _pair(layout)
    plan = Plan([torch.zeros(3), averaged], [torch.ones(3), source], only_copy=[False, True])
    recwarn.clear()
    plan.lerp_(0.5, found_inf=torch.ones(1))
    assert not torch.equal(averaged.to_dense(), source.to_dense())
    plan.lerp_(0.5)
    assert torch.equal(averaged.to_dense(), source.to_dense())
    assert torch.equal(plan.averaged[0], torch.full((3,), 0.5))
    assert not recwarn.list


@EACH
def test_plans_refuse_to_average_them(layout: str) -> None:
    averaged, source = _pair(layout)
    with pytest.raises(TypeError, match=r"pair 0: the averaged tensor has layout torch\.sparse_"):
        Plan([averaged], [source])
    with pytest.raises(TypeError, match=r"the source has layout torch\.sparse_"):
        Plan([source.to_dense()], [source], only_copy=[True])
    with pytest.raises(TypeError, match="has layout"):
        Plan([averaged], [LAYOUTS[layout](torch.ones(2, 2))], only_copy=[True])


def test_a_sparse_parameter_is_refused_by_name() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(_dense(generator()).to_sparse())
    averaged = AveragedWeights(model, 0.1)
    with pytest.raises(TypeError, match=r"'weight': the averaged tensor has layout"):
        averaged.update_parameters(model)
