"""The instruction sets of x86-64 that torch can be told to use, and those of this processor."""

from __future__ import annotations

import torch

ALL = ("default", "avx2", "avx512")  # as ATEN_CPU_CAPABILITY names them


def available() -> tuple[str, ...]:
    """Those that this processor has. Told to use another, torch would try."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return ALL[: ALL.index(best) + 1] if best in ALL else ALL[:1]
