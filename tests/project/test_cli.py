"""``python -m ema_fused info``, and ``reconstruct`` where something is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ema_fused
from ema_fused import cli
from ema_fused.engine import backends
from tests import processes


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


def test_info_says_what_an_install_without_the_extension_runs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "_why_no_native", "it was left out")
    lines = {" ".join(line.split()) for line in cli.info().splitlines()}
    assert "compiled no: it was left out" in lines
    assert "cpu tensors foreach, because it was left out" in lines


@pytest.mark.parametrize("reason", [None, "no code for it"])
def test_info_lists_every_gpu_and_what_serves_it(
    monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    gpu = SimpleNamespace(name="A GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(backends, "why_not_on", lambda device: reason)
    lines = {" ".join(line.split()) for line in cli.info().splitlines()}
    served = "cuda (native kernel)" if reason is None else f"foreach, because {reason}"
    for index in range(2):
        assert f"cuda:{index} A GPU, compute capability 9.0" in lines
        assert f"cuda:{index} tensors {served}" in lines


@pytest.mark.skipif(backends.native() is None, reason="nothing is compiled here")
def test_architectures_are_told_without_the_spelling_of_the_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native = backends.native()
    assert native is not None
    built = {"cuda_architectures": "90-real;120-virtual", "cuda_compiler": "nvcc 1"}
    built = native.build_info() | built
    monkeypatch.setattr(native, "build_info", lambda: built)
    assert "nvcc 1: 90, 120 as PTX\n" in cli.info()


def test_module_runs_as_a_command() -> None:
    done = processes.run("-m", "ema_fused", "info", EMA_FUSED_BACKEND="foreach")
    assert "foreach for everything" in done.stdout


def test_an_unknown_pinned_backend_is_told_not_raised() -> None:
    done = processes.run("-m", "ema_fused", "info", EMA_FUSED_BACKEND="fastest")
    assert "'fastest' is none of" in done.stdout


def test_an_unknown_command_is_refused() -> None:
    done = processes.run("-m", "ema_fused", "inform", status=2)
    assert "invalid choice" in done.stderr


def save_snapshot(folder: Path) -> None:
    pytest.importorskip("safetensors")
    model = torch.nn.Linear(3, 2)
    ema = ema_fused.PowerFunctionEMA(model)
    ema.update_parameters(model)
    ema.save_snapshot(folder)


def test_reconstruct_needs_no_progress_bar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_snapshot(tmp_path)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    out = tmp_path / "out.safetensors"
    assert cli.main(["reconstruct", str(tmp_path), "--sigma-rel", "0.07", "-o", str(out)]) == 0
    assert out.exists()
    assert "sigma_rel 0.07 at step 1 from 2 snapshots, 32 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["safetensors", "matplotlib"])
def test_reconstruct_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    save_snapshot(tmp_path)
    module = "safetensors.torch" if missing == "safetensors" else "matplotlib.figure"
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["--sigma-rel", "0.07", "-o", str(tmp_path / "o"), "--picture", str(tmp_path / "p")]
    assert cli.main(["reconstruct", str(tmp_path), *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and missing in told
    extra = "export" if missing == "safetensors" else "posthoc"
    assert f"pip install 'ema_fused[{extra}]'" in told
