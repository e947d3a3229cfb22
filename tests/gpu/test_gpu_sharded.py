"""On a GPU: averages of a model under FSDP2, in a process group of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_fused import AveragedWeights, attach
from ema_fused.engine.dtensors import is_sharded, local
from ema_fused.saving import checkpoints
from tests.device import DEVICE
from tests.networks import differences
from tests.sharded_models import batch, perceptron, whole

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_on_device(*, sharded: bool) -> nn.Module:
    model = perceptron().to(DEVICE)
    if sharded:
        mesh = init_device_mesh(DEVICE, (1,))
        for layer in (model.first, model.last, model):
            fully_shard(layer, mesh=mesh)
    return model


def trained(model: nn.Module, steps: int, **options: Any) -> AveragedWeights:
    averaged = AveragedWeights(model, 0.1, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(optimizer, model, averaged):
        for step in range(steps):
            inputs, targets = (tensor.to(DEVICE) for tensor in batch(step, 0))
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
    return averaged


def state_of(averaged: AveragedWeights) -> dict[str, Tensor]:
    return {name: whole(tensor).cpu() for name, tensor in averaged.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"offload": "cpu"}], ids=str)
def test_it_averages_as_without_sharding(options: dict[str, Any]) -> None:
    expected = state_of(trained(model_on_device(sharded=False), 8))
    averaged = trained(model_on_device(sharded=True), 8, **options)
    kinds = {local(tensor).device.type for tensor in averaged.weights.values()}
    assert kinds == ({"cpu"} if options.get("offload") else {DEVICE})
    assert differences(state_of(averaged), expected) == []


@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=str)
def test_it_is_evaluated_saved_loaded_and_gathered(options: dict[str, Any], tmp_path: Path) -> None:
    model = model_on_device(sharded=True)
    averaged = trained(model, 4, **options)
    inputs = torch.ones(2, 7, device=DEVICE)
    with torch.no_grad():
        model.eval()
        own = model(inputs).clone()
        with averaged.swapped(model):
            assert not torch.equal(model(inputs), own)
        assert torch.equal(model(inputs), own)
    checkpoints.save({"averaged": averaged.state_dict()}, tmp_path / "saved")
    fresh = AveragedWeights(model, 0.1, **options)
    state = fresh.state_dict()
    checkpoints.load({"averaged": state}, tmp_path / "saved")
    fresh.load_state_dict(state)
    assert differences(state_of(fresh), state_of(averaged)) == []
    full = checkpoints.averaged_state_dict(averaged, model, full_state_dict=True, cpu_offload=True)
    assert not any(map(is_sharded, full.values()))
    on_host = {name: tensor.cpu() for name, tensor in full.items()}
    assert differences(on_host, state_of(averaged)) == []
