"""On a GPU: torchtitan's EMA under FSDP2, in device and in host memory, beside foreach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_fused.engine.dtensors import local
from tests.device import DEVICE
from tests.frameworks import titan
from tests.sharded_models import batch, perceptron

try:
    titan.import_torchtitan()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def built(*, offload: bool) -> tuple[Any, Any]:
    from ema_fused.adapters.torchtitan import EMA

    model = perceptron().to(DEVICE)
    mesh = init_device_mesh(DEVICE, (1,))
    for layer in (model.first, model.last, model):
        fully_shard(layer, mesh=mesh)
    return model, EMA.Config(offload_to_cpu=offload).build(model_parts=[model])


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "on the host"])
def test_training_steps_and_a_checkpoint(offload: bool, tmp_path: Path) -> None:
    model, ours = built(offload=offload)
    theirs = titan.restated([model])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 11):
        inputs, targets = (tensor.to(DEVICE) for tensor in batch(step, 0))
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        theirs.step(step)
        ours.step(step)
    expected = {key: local(value).cpu() for key, value in theirs.state_dict().items()}
    state = ours.state_dict()
    assert {local(value).device.type for value in state.values()} == {"cpu" if offload else DEVICE}
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(local(value).cpu(), expected[key]), key
    dcp.save({"ema": ours}, checkpoint_id=str(tmp_path))
    _, again = built(offload=offload)
    dcp.load({"ema": again}, checkpoint_id=str(tmp_path))
    for key, value in again.state_dict().items():
        assert torch.equal(local(value).cpu(), expected[key]), key
