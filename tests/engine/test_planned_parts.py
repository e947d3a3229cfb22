"""A plan of several parts: all of them run, or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ema_fused import Plan

OPERATIONS: list[Callable[[Plan], None]] = [lambda p: p.lerp_(0.5), Plan.copy_, Plan.swap_]


def plan_of_two_parts() -> Plan:
    """Torch's functions update the 16-bit pair, the last one, where kernels update the other."""
    dtypes = (torch.float32, torch.bfloat16)
    averaged = [torch.zeros(3, 4, dtype=dtype) for dtype in dtypes]
    return Plan(averaged, [torch.ones(3, 4, dtype=dtype) for dtype in dtypes], arithmetic="axpby")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_updated_where_one_part_is_not_as_planned(
    operation: Callable[[Plan], None],
) -> None:
    plan = plan_of_two_parts()
    plan.source[1].data = torch.ones(4, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="pair 1: the source was planned as bfloat16"):
        operation(plan)
    assert not any(tensor.any() for tensor in plan.averaged)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_strides_are_planned_again(operation: Callable[[Plan], None]) -> None:
    plan = plan_of_two_parts()
    plan.source[1].data = torch.ones(4, 3, dtype=torch.bfloat16).t()
    operation(plan)
    assert len({tensor.float().unique().item() for tensor in plan.averaged}) == 1
    assert all(tensor.all() for tensor in plan.averaged)
