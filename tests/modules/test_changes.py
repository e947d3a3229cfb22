"""What is written into a model inside ``swapped()`` is in the average afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.modules import changes
from tests.networks import CPU_BACKENDS, conv_net, differences, run, snapshot

DTYPES = {
    "equal": (torch.float32, None),
    "wider": (torch.bfloat16, torch.float32),
    "double": (torch.float32, torch.float64),
    "narrower": (torch.float32, torch.bfloat16),
}


def trained(dtypes: str, backend: str | None) -> tuple[nn.Module, ExponentialMovingAverage]:
    dtype, averaged_dtype = DTYPES[dtypes]
    model = conv_net(dtype=dtype)
    averaged = ExponentialMovingAverage(
        model, 0.25, averaged_dtype=averaged_dtype, update_buffers=True, backend=backend
    )
    run(averaged, model, 3)
    return model, averaged


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_recomputed_statistics_reach_the_average(dtypes: str, backend: str | None) -> None:
    model, averaged = trained(dtypes, backend)
    raw, average = snapshot(model), snapshot(averaged.module)
    with averaged.swapped(model):
        update_bn([torch.rand(8, 1, 6, 6, dtype=DTYPES[dtypes][0]) + 5 for _ in range(3)], model)
        recomputed = {f"norm.{name}": b.clone() for name, b in model.norm.named_buffers()}
    assert differences(snapshot(model), raw) == []
    after = snapshot(averaged.module)
    for name, buffer in recomputed.items():
        assert torch.equal(after.pop(name), buffer.to(average.pop(name).dtype)), name
    assert differences(after, average) == []


@pytest.mark.parametrize("piece", [2**20, 500, 1], ids=["whole", "pieces", "rows"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_elements_that_were_not_written_keep_every_bit(
    dtypes: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_PIECE", piece)
    model, averaged = trained(dtypes, None)
    raw, expected = snapshot(model), snapshot(averaged.module)
    expected["head.weight"][2, 3] = expected["head.weight"][-1, -1] = 7.0
    with averaged.swapped(model):
        model.head.weight.data[2, 3] = model.head.weight.data[-1, -1] = 7.0
        model.hidden.weight.data = model.hidden.weight.data.clone()
        model.head.bias = nn.Parameter(model.head.bias.detach().clone())
    assert differences(snapshot(model), raw) == []
    assert differences(snapshot(averaged.module), expected) == []


def test_a_nan_in_the_average_costs_its_neighbours_nothing() -> None:
    model, averaged = trained("wider", None)
    with torch.no_grad():
        averaged.module.head.weight[0, 0] = torch.nan
        averaged.module.head.weight[0, 1] = -0.0
    average = averaged.module.head.weight.detach().clone()
    with averaged.swapped(model):
        pass
    bits = torch.int32
    assert torch.equal(averaged.module.head.weight.detach().view(bits), average.view(bits))


def test_an_exchange_of_a_hook_does_the_same() -> None:
    model, averaged = trained("wider", None)
    raw = snapshot(model)
    exchange = averaged.exchange_with(model, averages_alone=True)
    exchange.put_in()
    with torch.no_grad():
        model.norm.running_mean.fill_(3.0)
    exchange.take_out()
    assert differences(snapshot(model), raw) == []
    assert bool((averaged.module.norm.running_mean == 3.0).all())


def test_complex_averages_of_another_dtype_do_the_same() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    averaged = ExponentialMovingAverage(model, 0.25, averaged_dtype=torch.float32)
    averaged.update_parameters(model)
    averaged.module.weight.data = averaged.module.weight.data.to(torch.complex128) / 3
    expected = averaged.module.weight.detach().clone()
    expected[1] = 2 + 1j
    with averaged.swapped(model):
        model.weight.data[1] = 2 + 1j
    assert torch.equal(averaged.module.weight, expected)


def test_a_model_converted_and_kept_so_tells_nothing_of_changes() -> None:
    """Its elements have been rounded again; the average stays what it is."""
    model = nn.Linear(3, 3).bfloat16()
    averaged = ExponentialMovingAverage(model, 0.25, averaged_dtype=torch.float32)
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in averaged.module.parameters():
            parameter.div_(3)
    average = snapshot(averaged.module)
    with averaged.swapped(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    assert differences(snapshot(averaged.module), average) == []
