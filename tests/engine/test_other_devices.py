"""Devices that no kernel is built for: ROCm, MPS, XPU. Torch's foreach functions serve them."""

from __future__ import annotations

import warnings

import pytest
import torch

import ema_fused
from ema_fused.engine import backends

pytestmark = pytest.mark.skipif(backends.native() is None, reason="all devices have one reason")


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_no_kernel_is_built_for_them(device: str) -> None:
    assert backends.why_not_on(torch.device(device)) == (
        f"no kernel is built for device type {device!r}"
    )


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a ROCm build of torch, where the device type "cuda" is AMD's. Its tensors can't be had
    here, so those of the CPU say that they are on such a device."""
    why_not_on = backends.why_not_on
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(backends, "why_not_on", lambda _: why_not_on(torch.device("cuda", 0)))
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.usefixtures("rocm")
def test_rocm_is_served_by_foreach_with_one_warning() -> None:
    averaged, source = [torch.zeros(3), torch.zeros(5)], [torch.ones(3), torch.ones(5)]
    with pytest.warns(ema_fused.SlowPathWarning, match="because no kernel is built for ROCm"):
        plan = ema_fused.Plan(averaged, source)
    assert plan.backends == ("foreach",)
    plan.lerp_(0.25)
    assert all(torch.equal(tensor, torch.full_like(tensor, 0.25)) for tensor in averaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema_fused.Plan(averaged, source)


@pytest.mark.usefixtures("rocm")
def test_the_cuda_backend_is_refused_under_rocm() -> None:
    with pytest.raises(RuntimeError, match="can't be used: no kernel is built for ROCm"):
        ema_fused.Plan([torch.zeros(3)], [torch.ones(3)], backend="cuda")
