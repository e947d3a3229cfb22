"""What numbers of a GPU belong to: the device, its driver, the toolkit, the versions, the commit.

    python benchmarks/gpu_device.py

prints the device's compute capability and its name as part of a file name ("9.0 nvidia_h200"), for
gpu_check.sh; exit status 77 where torch sees no GPU. Needs nothing but torch: it runs before the
extension is built.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

NO_GPU = 77  # the exit status by which a test program says that it was skipped
REHEARSAL = "cpu: a rehearsal, not a measurement of a GPU"
_ROOT = Path(__file__).resolve().parent.parent


def why_no_gpu() -> str | None:
    """Why nothing can be measured here; None where torch sees a GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def environment(device: torch.device) -> dict[str, str | int]:
    """The device and the versions that the numbers belong to; ``"unknown"`` for what nobody says.

    ``EMA_FUSED_COMMIT`` names the commit where the checkout came without its history.
    """
    about: dict[str, str | int] = {"device": REHEARSAL}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about = {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
            "driver": _driver(),
        }
    return about | {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "nvcc": _nvcc(),
        "python": platform.python_version(),
        "cores": os.cpu_count() or 0,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    done = subprocess.run(
        [program, *command[1:]], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else "unknown"


def _nvcc() -> str:
    """The version of the nvcc that CMake would take."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    names = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for name in names:
        match = re.search(r"V(\d+\.\d+\.\d+)", _output(name, "--version") or "")
        if match is not None:
            return match[1]
    return "unknown"


def _commit() -> str:
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return os.environ.get("EMA_FUSED_COMMIT", "unknown")
    # Results themselves are written into the tree; they change nothing about what was measured.
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return commit if changes == "" else f"{commit}-dirty"


def main() -> None:
    """Print what gpu_check.sh builds for and how it names its files."""
    reason = why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        sys.exit(NO_GPU)
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor}", slug(torch.cuda.get_device_name()))


if __name__ == "__main__":
    main()
