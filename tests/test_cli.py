"""``python -m ema_fused info``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ema_fused
from ema_fused import backends, cli


def test_info_tells_versions_build_devices_and_backends() -> None:
    text = cli.info()
    assert ema_fused.__version__ in text
    assert torch.__version__ in text
    for name in ("compiled", "cpu tensors", "cuda tensors"):
        assert any(line.startswith(name) for line in text.splitlines()), name
    native = backends.native()
    if native is not None:
        assert native.cpu_isa() in text
        assert "cpu (native kernel)" in text


def test_info_says_why_cuda_does_not_serve() -> None:
    reason = backends.why_not("cuda")
    if reason is None:
        pytest.skip("CUDA does serve on this machine")
    assert reason in cli.info()


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ema_fused", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_module_runs_as_a_command() -> None:
    done = run_module("info", EMA_FUSED_BACKEND="foreach")
    assert done.returncode == 0, done.stderr
    assert "foreach for everything" in done.stdout


def test_an_unknown_pinned_backend_is_told_not_raised() -> None:
    done = run_module("info", EMA_FUSED_BACKEND="fastest")
    assert done.returncode == 0, done.stderr
    assert "'fastest' is none of" in done.stdout


def test_an_unknown_command_is_refused() -> None:
    done = run_module("inform")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
