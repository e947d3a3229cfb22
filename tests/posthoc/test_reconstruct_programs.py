"""Reconstruction as whole programs: a run killed while it saves, and the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from ema_fused.posthoc.reconstruction import Reconstruction, reconstruct
from tests import processes
from tests.networks import conv_net, differences
from tests.posthoc.test_reconstruct import trained

load_file = pytest.importorskip("safetensors.torch").load_file

pytestmark = pytest.mark.slow

# Killed while it writes.

PROGRAM = """
import os, sys, time
from pathlib import Path
import safetensors.torch
import torch
from tests.networks import conv_net, generator, train
from ema_fused import PowerFunctionEMA

folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
whole = safetensors.torch.save_file

def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    if metadata["steps"] == str(kill_at) and metadata["sigma_rel"] == "0.1":
        os.truncate(path, os.path.getsize(path) // 2)
        print("half", flush=True)
        time.sleep(600)

safetensors.torch.save_file = half
model, random = conv_net(), generator()
ema = PowerFunctionEMA(model)
if (folder / "state.pt").exists():
    model_state, ema_state, random_state = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(model_state)
    ema.load_state_dict(ema_state)
    random.set_state(random_state)
while ema.steps < 40:
    train(model, random)
    ema.update_parameters(model)
    if ema.steps % 10 == 0:
        ema.save_snapshot(folder / "run")
    if ema.steps % 10 == 5:
        state = [model.state_dict(), ema.state_dict(), random.get_state()]
        torch.save(state, folder / "beside.pt")
        os.replace(folder / "beside.pt", folder / "state.pt")
"""


def start(folder: Path, kill_at: int) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return processes.start("-c", PROGRAM, folder, kill_at)


def test_a_run_killed_while_it_saves_leaves_no_half_file_and_goes_on_to_the_bit(
    tmp_path: Path,
) -> None:
    straight = start(tmp_path / "straight", -1)
    killed = start(tmp_path / "killed", 30)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "half\n"
    killed.send_signal(signal.SIGKILL)
    processes.finish(killed, -signal.SIGKILL)
    processes.finish(straight)

    run_dir, other = tmp_path / "killed" / "run", tmp_path / "straight" / "run"
    (partial,) = run_dir.glob("*.partial")
    with pytest.raises(Exception, match="not fully covered"):
        load_file(partial)
    # Of step 30 one file is there; what is there is used.
    at_30 = Reconstruction(run_dir, 0.07)
    assert at_30.steps == 30 and len(at_30.snapshots) == 5
    at_20 = reconstruct(run_dir, 0.07, step=20)
    assert differences(at_20, reconstruct(other, 0.07, step=20)) == []

    processes.finish(start(tmp_path / "killed", -1))
    names = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in run_dir.iterdir()) == names and len(names) == 8
    for name in names:
        assert differences(load_file(run_dir / name), load_file(other / name)) == []
    assert differences(reconstruct(run_dir, 0.07), reconstruct(other, 0.07)) == []


# The command.


COMMAND = ("-m", "ema_fused", "reconstruct")


def test_the_command_writes_the_file_and_the_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    run_dir, out, png = tmp_path / "run", tmp_path / "out.safetensors", tmp_path / "profiles.png"
    trained(conv_net(), run_dir)
    options = ["--sigma-rel", 0.08, "-o", out, "--step", 9, "--picture", png]
    done = processes.run_fork("torch", *COMMAND, run_dir, *options)
    assert "sigma_rel 0.08 at step 9 from 6 snapshots" in done.stdout
    assert done.stderr == ""  # no bar where there is no terminal
    assert differences(load_file(out), reconstruct(run_dir, 0.08, 9)) == []
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = image.imread(png)[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    # Blue is what was asked for, orange what was reached.
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        near = np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02
        assert near.sum() > 200, colour
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, png.name, "run"]


@pytest.mark.parametrize(
    ("width", "match"), [("0.3", "sigma_rel is 0.3"), ("0.08", "no snapshot-")]
)
def test_the_command_says_what_is_wrong(tmp_path: Path, width: str, match: str) -> None:
    options = ["--sigma-rel", width, "-o", tmp_path / "out.safetensors"]
    done = processes.run_fork("torch", *COMMAND, tmp_path, *options, status=1)
    assert done.stderr.startswith("error: ") and match in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    trained(conv_net(), tmp_path)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    arguments = [tmp_path, "--sigma-rel", "0.08", "-o", tmp_path / "out.safetensors"]
    done = subprocess.run(
        [sys.executable, *COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "averaging: 100%" in shown
    assert b"step 12" in done.stdout
