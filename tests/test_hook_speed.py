"""The benchmark of the hooks measures what it says. No test here looks at how long it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine's hooks are measured")
pytest.importorskip("mmcv", reason="mmcv's hooks are measured")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DROP_INS = [
    "mmengine EMAHook, ExponentialMovingAverage",
    "mmengine EMAHook, StochasticWeightAverage",
    "mmengine EMAHook, MomentumAnnealingEMA",
    "mmengine EMAHook, mmdet's ExpMomentumEMA",
    "mmengine EMAHook, MMPretrain's CosineEMA",
    "mmengine EMAHook, swap in and out",
    "mmdet 3 MeanTeacherHook",
    "mmcv 1 EMAHook",
    "mmdet 2 ExpMomentumEMAHook",
    "mmdet 2 LinearMomentumEMAHook",
    "MMSelfSup 0 MomentumUpdateHook, BYOL",
]


def run(report: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """On one thread: two wait long for each other where others keep the machine busy."""
    options = ["--quick", "--threads", "1", "--json", str(report)]
    return subprocess.run(
        [sys.executable, *command, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
    )


def test_quick_run_measures_every_drop_in_on_both_sets_of_shapes(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run(report, str(BENCHMARKS / "hook_speed.py"))
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text(encoding="utf-8"))

    about = written["environment"]
    assert about["torch"] == torch.__version__
    assert about["threads"] == 1
    for package in ("mmengine", "mmcv", "mmdet", "mmpretrain", "mmselfsup"):
        assert f"{package}==" in about["originals"]

    found = {(r["group"], r["shapes"], r["contender"]): r for r in written["results"]}
    assert len(found) == len(written["results"])
    sets = ("quick-resnet50", "quick-1000x1024")
    sides = ("ema_fused", "original")
    assert list(found) == [(d, s, side) for s in sets for d in DROP_INS for side in sides]
    lines = done.stdout.splitlines()
    for (drop_in, shapes, _), row in found.items():
        timing = row["timing"]
        assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
        ours = found[drop_in, shapes, "ema_fused"]["timing"]["median"]
        assert row["ratio"] == pytest.approx(timing["median"] / ours)
        line = next(line for line in lines if line.startswith(f"| {drop_in} |"))
        assert line.count("|") == 4, "one cell for each of the two sets of shapes"
        ratio = found[drop_in, shapes, "original"]["ratio"]
        assert f"**{ratio:.2f}** ({ours * 1e3:.3g}, " in line


PLANTED = {
    "mmengine EMAHook, ExponentialMovingAverage": (
        "from ema_fused.averages import ExponentialMovingAverage as average\n"
        "average.momentum_at = lambda self, steps: 1.0001 * self.momentum\n"
    ),
    # Swapped in rightly, and not taken out again.
    "mmengine EMAHook, swap in and out": (
        "from ema_fused.hooks.mmengine import EMAHook\n"
        "EMAHook.after_val_epoch = lambda *arguments: None\n"
    ),
    "MMSelfSup 0 MomentumUpdateHook, BYOL": (
        "import ema_fused.hooks.momentum_update as ours\n"
        "ours._ALGORITHMS = {name: ours.Networks('online_net', 'target_net')\n"
        "    for name in ours._ALGORITHMS}\n"
    ),
}


@pytest.mark.parametrize("drop_in", list(PLANTED))
def test_a_wrong_result_stops_the_benchmark(tmp_path: Path, drop_in: str) -> None:
    report = tmp_path / "report.json"
    script = tmp_path / "planted.py"
    # mmcv looks for torchvision, for which the benchmark has a stand-in.
    script.write_text(
        "import originals\noriginals.import_mmcv()\n"
        f"{PLANTED[drop_in]}import hook_speed\nhook_speed.main()\n",
        encoding="utf-8",
    )
    done = run(report, str(script))
    assert done.returncode != 0
    assert f"AssertionError: {drop_in}: '" in done.stderr
    assert "differs from the original's after update 1" in done.stderr
    assert not report.exists()
    assert "| one update |" not in done.stdout
