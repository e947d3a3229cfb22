"""The GPU that gpu_check.sh builds for, and how it names its files.

    python -m benchmarks.gpu_device

prints the compute capability and the name as part of a file name ("9.0 nvidia_h200"); exit status
77 where torch sees no GPU. Runs before the extension is built.
"""

from __future__ import annotations

import re
import sys

import torch

from benchmarks import NO_GPU
from ema_fused.bench.environment import why_no_gpu


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def main() -> int:
    """The exit status; prints the capability and the slug."""
    reason = why_no_gpu()
    if reason is not None:
        sys.stderr.write(f"{reason}\n")
        return NO_GPU
    major, minor = torch.cuda.get_device_capability()
    sys.stdout.write(f"{major}.{minor} {slug(torch.cuda.get_device_name())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
