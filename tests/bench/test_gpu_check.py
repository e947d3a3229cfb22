"""``benchmarks/gpu_check.sh`` with a stub in place of every program that it calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

BENCHMARKS = ROOT / "benchmarks"

STUB = """#!/bin/sh
# Stands in for every program: says that it was called, and ends as the test wants it to.
call="$(basename "$0") $*"
echo "$call" >>"$STUB_CALLS"
case "$call" in *"$STUB_HANGS"*) exec sleep 60 ;; esac
case "$call" in *"$STUB_FAILS"*) exit 3 ;; esac
case "$call" in
  *gpu_device) if [ -n "$STUB_GPU" ]; then echo "9.0 nvidia_stub"; else exit 77; fi ;;
  *"-m pybind11 --cmakedir") echo pybind11-here ;;
  gpu_update* | *"-m benchmarks --device cuda"*) if [ -z "$STUB_GPU" ]; then exit 77; fi ;;
esac
"""
STEPS = [
    "configure",
    "build",
    "configure_program",
    "build_program",
    "update",
    "memcheck",
    "racecheck",
    "initcheck",
    "tests",
    "speed",
]


class Checked:
    """What one run of the script with stubs did."""

    def __init__(
        self,
        folder: Path,
        *,
        gpu: bool = True,
        fails: str = "nothing",
        hangs: str = "nothing",
        seconds: int = 540,
        without: str | None = None,
    ) -> None:
        programs, build, calls = folder / "bin", folder / "build/program", folder / "calls"
        self.results = folder / "results"
        for parent, names in (
            (programs, ["python3", "cmake", "compute-sanitizer"]),
            (build, ["gpu_update"]),
        ):
            parent.mkdir(parents=True)
            for name in names:
                if name != without:
                    (parent / name).write_text(STUB, encoding="utf-8")
                    (parent / name).chmod(0o755)
        calls.touch()
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "GPU_CHECK_BUILD": str(build.parent),
            "GPU_CHECK_SECONDS": str(seconds),
            "STUB_CALLS": str(calls),
            "STUB_GPU": "yes" if gpu else "",
            "STUB_FAILS": fails,
            "STUB_HANGS": hangs,
        }
        self.done = subprocess.run(
            [str(BENCHMARKS / "gpu_check.sh"), str(self.results)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        self.calls = calls.read_text(encoding="utf-8").splitlines()
        summary = self.done.stdout.rpartition("\nstep ")[2].splitlines()[1:]
        self.outcomes = {
            line.split()[0]: line.split(maxsplit=2)[2]
            for line in summary
            if line.split()[0] in STEPS
        }


def test_the_script_is_well_formed() -> None:
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu_check.sh")], check=True)


def test_all_steps_run_in_order(tmp_path: Path) -> None:
    checked = Checked(tmp_path)
    assert checked.done.returncode == 0, checked.done.stdout + checked.done.stderr
    assert checked.outcomes == dict.fromkeys(STEPS, "ok")
    assert list(checked.outcomes) == STEPS
    results, build = checked.results, tmp_path / "build/program"
    extension = tmp_path / "build/extension"
    with_gpu_tests = sorted(
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in file.read_text(encoding="utf-8")
    )
    assert len(with_gpu_tests) >= 3
    configured = "-G Ninja -DEMA_FUSED_CUDA=ON -DEMA_FUSED_CUDA_ARCHITECTURES=90-real"
    assert checked.calls[2:] == [
        f"cmake -S . -B {extension} {configured} -DPython_EXECUTABLE={tmp_path}/bin/python3 "
        f"-Dpybind11_DIR=pybind11-here "
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BENCHMARKS.parent}/ema_fused",
        f"cmake --build {extension} --target _C",
        f"cmake -S . -B {build} {configured} -DEMA_FUSED_PYTHON=OFF -DEMA_FUSED_TESTS=ON",
        f"cmake --build {build} --target gpu_update",
        "gpu_update ",
        *(
            f"compute-sanitizer --tool {tool} --error-exitcode 1 {build}/gpu_update"
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        # The files with such tests alone: others import frameworks that aren't there.
        f"python3 -m pytest -m gpu -q {' '.join(with_gpu_tests)}",
        f"python3 -m benchmarks --device cuda --seconds 201 --json {results}/gpu_nvidia_stub.json "
        f"--markdown {results}/gpu_nvidia_stub.md",
    ]
    assert sorted(file.name for file in results.iterdir()) == sorted(
        f"gpu_{step}.log" for step in STEPS
    )


@pytest.mark.parametrize(
    ("fails", "failed"),
    [
        ("--target _C", ["build", "tests", "speed"]),
        ("--target gpu", ["build_program", "update", "memcheck", "racecheck", "initcheck"]),
        ("TESTS=ON", ["configure_program", "update", "memcheck", "racecheck", "initcheck"]),
        ("racecheck", ["racecheck"]),
        ("-m pytest", ["tests"]),
        ("-m benchmarks --device", ["speed"]),
    ],
)
def test_a_failed_step_ends_only_what_needs_it(
    tmp_path: Path, fails: str, failed: list[str]
) -> None:
    checked = Checked(tmp_path, fails=fails)
    assert checked.done.returncode == 1
    found = [step for step, outcome in checked.outcomes.items() if outcome.startswith("FAILED")]
    assert found == failed
    assert checked.outcomes[failed[0]] == "FAILED: status 3"
    others = [outcome for step, outcome in checked.outcomes.items() if step not in failed]
    assert set(others) == {"ok"}


def test_without_a_gpu_the_script_builds_and_says_what_is_unmeasured(tmp_path: Path) -> None:
    checked = Checked(tmp_path, gpu=False)
    assert checked.done.returncode == 77
    assert list(checked.outcomes) == STEPS
    assert {step for step, outcome in checked.outcomes.items() if outcome == "ok"} == {
        "configure",
        "build",
        "configure_program",
        "build_program",
    }
    assert checked.outcomes["tests"] == "no GPU: all skipped"
    assert checked.outcomes["update"] == checked.outcomes["speed"] == "no GPU"
    assert any("-DEMA_FUSED_CUDA_ARCHITECTURES= " in call for call in checked.calls)
    assert "all of the speed is unmeasured" in checked.done.stdout.splitlines()[-1]


def test_without_a_gpu_a_failed_build_is_a_failure(tmp_path: Path) -> None:
    checked = Checked(tmp_path, gpu=False, fails="--target _C")
    assert checked.done.returncode == 1
    assert checked.outcomes["build"] == "FAILED: status 3"


def test_a_step_that_hangs_is_stopped(tmp_path: Path) -> None:
    checked = Checked(tmp_path, hangs="--target _C", seconds=10)
    assert checked.done.returncode == 1
    assert checked.outcomes["build"] == "FAILED: stopped after 3 s"


@pytest.mark.skipif(
    shutil.which("compute-sanitizer", path="/usr/bin:/bin:/usr/local/cuda/bin") is not None,
    reason="compute-sanitizer is installed",
)
def test_a_missing_sanitizer_is_a_failure(tmp_path: Path) -> None:
    checked = Checked(tmp_path, without="compute-sanitizer")
    assert checked.done.returncode == 1
    assert "compute-sanitizer was not found" in checked.outcomes["memcheck"]
    assert checked.outcomes["speed"] == "ok"
