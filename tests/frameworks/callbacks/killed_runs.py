"""Trainings in a process of their own, which may be killed on their way and resumed.

python some_run.py FOLDER [--kill-at STEP] [--resume]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests import ROOT

HERE = Path(__file__).parent


def start(script: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Starts a script of this folder."""
    return subprocess.Popen(
        [sys.executable, HERE / script, folder, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_as_asked(run: Callable[..., object]) -> None:
    """What such a script does: ``run(folder, kill_at=..., resume=...)``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    run(options.folder, kill_at=options.kill_at, resume=options.resume)
