"""The environment of a measurement: the device, its driver, the versions, the command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import ema_fused

Environment = dict[str, str | int | float]


def why_no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here; None if torch sees one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def environment(device: torch.device) -> Environment:
    """The device and the versions; ``"unknown"`` for versions that can't be found."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about: Environment = {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda or "none",
            "nvcc": _nvcc(),
        }
    else:
        about = {"device": _cpu_model()}
    return about | {
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ema_fused": ema_fused.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": command(),
    }


def command() -> str:
    """The command line, with ``-m`` if a module was run."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def output_of(*words: str) -> str | None:
    """The output of a command, or None if it is missing or fails."""
    program = shutil.which(words[0])
    if program is None:
        return None
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str:
    printed = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return (printed or "unknown").splitlines()[0]


def _nvcc() -> str:
    printed = output_of("nvcc", "--version") or ""
    releases = [line for line in printed.splitlines() if "release" in line]
    return releases[0].partition("release ")[2] if releases else "unknown"
