"""Prints how many threads a plan has started, of so many tensors of so many elements."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ema_fused import Plan


def main() -> None:
    tensors, elements = map(int, sys.argv[1:])
    torch.set_num_threads(4)
    averaged = [torch.empty(elements) for _ in range(tensors)]
    plan = Plan(averaged, [torch.empty_like(tensor) for tensor in averaged])
    before = threads()
    plan.lerp_(0.5)
    plan.lerp_(0.5)
    sys.stdout.write(f"{threads() - before}\n")


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


if __name__ == "__main__":
    main()
