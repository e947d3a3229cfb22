"""What the adapters write, autograd and autocast are told of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.adapters.adapter_cases import timm_originals
from tests.networks import conv_net

REFUSED = r"modified by an inplace operation"


def images() -> Tensor:
    return torch.rand(2, 1, 6, 6, requires_grad=True)


def _diffusers(model: nn.Module) -> Iterator[None]:
    from ema_fused.adapters.diffusers import EMAModel

    for foreach in (False, True):
        ema = EMAModel(model.parameters(), decay=0.5, foreach=foreach)
        ema.step(list(model.parameters()))
        ema.store(model.parameters())
        yield
        ema.copy_to(model.parameters())
        yield
        ema.restore(model.parameters())
    yield


def _torch_ema(model: nn.Module) -> Iterator[None]:
    from ema_fused.adapters.torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=0.5)
    yield
    ema.copy_to()
    with ema.average_parameters():
        yield
    yield


def _ema_pytorch(model: nn.Module) -> Iterator[None]:
    from ema_fused.adapters.ema_pytorch import EMA

    ema = EMA(model, beta=0.5, update_after_step=0, update_every=1)
    ema.update()
    yield
    ema.update_model_with_ema()
    yield
    ema.update_model_with_ema(0.5)
    yield


@pytest.mark.parametrize("adapter", [_diffusers, _torch_ema, _ema_pytorch])
def test_going_back_through_parameters_that_were_written_is_refused(
    adapter: Callable[[nn.Module], Iterator[None]],
) -> None:
    model = conv_net().eval()
    writes = adapter(model)
    next(writes)
    loss = model(images()).square().sum()
    count = 0
    for _ in writes:
        count += 1
        with pytest.raises(RuntimeError, match=REFUSED):
            loss.backward()
        loss = model(images()).square().sum()
    assert count >= 2
    loss.backward()


@pytest.mark.parametrize("adapter", [_diffusers, _torch_ema, _ema_pytorch])
def test_autocast_casts_what_was_written(
    adapter: Callable[[nn.Module], Iterator[None]],
) -> None:
    model, inputs = conv_net().eval(), images()
    writes = adapter(model)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in writes:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            torch.clear_autocast_cache()
            model(inputs)
            next(writes, None)
            seen = model(inputs)
            torch.clear_autocast_cache()
            assert torch.equal(seen, model(inputs))


def _timm(cls: str, model: nn.Module, **options: Any) -> tuple[nn.Module, Callable[[], None]]:
    try:
        timm_originals()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from ema_fused.adapters import timm

    ema = getattr(timm, cls)(model, decay=0.5, **options)
    return ema.module, lambda: ema.update(model)


def _averaged_by_ema_pytorch(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    from ema_fused.adapters.ema_pytorch import EMA

    ema = EMA(model, beta=0.5, update_after_step=0, update_every=1)
    ema.update()
    return ema.ema_model, ema.update


@pytest.mark.parametrize(
    "make",
    [
        lambda model: _timm("ModelEmaV2", model),
        lambda model: _timm("ModelEmaV3", model),
        lambda model: _timm("ModelEmaV3", model, exclude_buffers=True),
        _averaged_by_ema_pytorch,
    ],
    ids=["timm-v2", "timm-v3", "timm-v3-without-buffers", "ema-pytorch"],
)
def test_going_back_through_an_updated_average_is_refused(
    make: Callable[[nn.Module], tuple[nn.Module, Callable[[], None]]],
) -> None:
    model = conv_net().eval()
    averaged, update = make(model)
    averaged.eval()
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        loss = averaged(images()).square().sum()
        update()
        with pytest.raises(RuntimeError, match=REFUSED):
            loss.backward()
    averaged(images()).square().sum().backward()
