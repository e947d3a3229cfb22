"""What apex's functions compute, in torch's arithmetic: apex itself is built where a GPU is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def multi_tensor_axpby(
    chunk_size: int, flag: Tensor, lists: Sequence[list[Tensor]], a: float, b: float, which: int
) -> None:
    for x, y, out in zip(*lists, strict=True):
        out.copy_(a * x + b * y)


class FusedAdamSWA(torch.optim.Adam):
    """The first step copies, the others average."""

    def __init__(
        self,
        params: list[Tensor],
        compute_params: list[Tensor],
        swa_params: list[Tensor],
        swa_decay_rate: float,
        lr: float,
    ) -> None:
        super().__init__(params, lr=lr)
        self.averages, self.weight, self.steps = swa_params, 1 - swa_decay_rate, 0

    def step(self, closure: Any = None) -> None:
        super().step()
        for average, parameter in zip(self.averages, self.param_groups[0]["params"], strict=True):
            average.lerp_(parameter.detach(), self.weight if self.steps else 1.0)
        self.steps += 1


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on they are found under the names of apex's modules."""
    modules = {
        "amp_C": {"multi_tensor_axpby": multi_tensor_axpby},
        "apex": {},
        "apex.contrib": {},
        "apex.contrib.openfold_triton": {},
        "apex.contrib.openfold_triton.fused_adam_swa": {"FusedAdamSWA": FusedAdamSWA},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
