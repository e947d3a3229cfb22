"""Weights and flags that are tensors: on the CPU here, on a GPU in gpu/test_gpu_execution.py."""

from __future__ import annotations

import pytest
import torch

from ema_fused import Plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_weight_may_be_a_tensor_of_any_real_dtype(dtype: torch.dtype, backend: str) -> None:
    averaged, expected = [torch.zeros(3), torch.zeros(5)], [torch.zeros(3), torch.zeros(5)]
    source = [torch.ones(3), torch.full((5,), 2.0)]
    weight = torch.tensor(0.3).to(dtype)
    Plan(averaged, source, backend=backend).lerp_(weight)
    torch._foreach_lerp_(expected, source, float(weight))
    assert all(torch.equal(a, e) for a, e in zip(averaged, expected, strict=True))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_a_set_flag_makes_an_update_do_nothing(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    averaged = [torch.zeros(3), torch.zeros(5), torch.tensor(1)]
    source = [torch.ones(3), torch.ones(5).bfloat16(), torch.tensor(4)]
    plan = Plan(averaged, source, only_copy=[False, False, True], backend=backend)
    found_inf = torch.zeros(shape, dtype=dtype)
    plan.lerp_(0.5, found_inf=found_inf.fill_(1))
    assert [float(tensor.sum()) for tensor in averaged] == [0.0, 0.0, 1.0]
    if dtype == torch.float64:
        plan.lerp_(0.5, found_inf=found_inf.fill_(1e-300))  # would be 0 as a float32
        assert not averaged[0].any()
    plan.lerp_(0.5, found_inf=found_inf.zero_())
    assert [float(tensor.sum()) for tensor in averaged] == [1.5, 2.5, 4.0]


def test_the_flag_of_a_gradient_scaler_is_one(backend: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    averaged = torch.ones(4)
    plan = Plan([averaged], [weight], backend=backend)
    for gradient, skipped in ((1.0, False), (float("inf"), True), (1.0, False)):
        before = averaged.clone()
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        flags = scaler._found_inf_per_device(optimizer)
        scaler.step(optimizer)
        plan.lerp_(0.5, found_inf=flags[weight.device])
        scaler.update()
        assert torch.equal(averaged, before) == skipped


def test_a_skipped_update_still_tells_of_changed_tensors(backend: str) -> None:
    averaged, source = torch.zeros(3), torch.ones(3)
    plan = Plan([averaged], [source], backend=backend)
    source.data = torch.ones(4)
    with pytest.raises(ValueError, match="was planned as float32 of shape"):
        plan.lerp_(0.5, found_inf=torch.zeros(1))


def test_other_scalars_are_refused(backend: str) -> None:
    averaged = [torch.zeros(3), torch.zeros(5)]
    plan = Plan(averaged, [torch.ones(3), torch.ones(5)], backend=backend)
    with pytest.raises(TypeError, match=r"found_inf is 1\.0; a tensor of one number"):
        plan.lerp_(0.5, found_inf=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found_inf has shape \(2,\)"):
        plan.lerp_(0.5, found_inf=torch.zeros(2))
    with pytest.raises(TypeError, match=r"complex64; a real number is expected"):
        plan.lerp_(torch.tensor(1j))
    with pytest.raises(ValueError, match=r"the weight is a tensor of shape \(1,\)"):
        plan.lerp_(torch.zeros(1))
    for stream in (3, "cuda", torch.device("cuda")):
        with pytest.raises(TypeError, match=r"a torch.cuda.Stream is expected"):
            plan.lerp_(0.5, stream=stream)  # type: ignore[arg-type]
    assert not any(tensor.any() for tensor in averaged)
