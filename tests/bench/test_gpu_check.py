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
case "$call" in *"-m benchmarks --"*) cp "$STUB_NOTED" "$STUB_KEPT" ;; esac
case "$call" in *"$STUB_HANGS"*) exec sleep 60 ;; esac
case "$call" in *"$STUB_FAILS"*) exit 3 ;; esac
case "$call" in
  *gpu_device) if [ -n "$STUB_GPU" ]; then echo "9.0 nvidia_stub"; else exit 77; fi ;;
  *"-m pybind11 --cmakedir") echo pybind11-here ;;
  *"--target _C") if [ -e ema_fused/_C.stub.so ]; then echo built >ema_fused/_C.stub.so; fi ;;
  gpu_update*) if [ -z "$STUB_GPU" ]; then exit 77; fi ;;
esac
"""
STEPS = {
    "build": ["configure", "build"],
    "correctness": ["tests", "build_program", "update"],
    "speed": ["speed"],
    "sanitizers": ["memcheck", "racecheck", "initcheck"],
}
ALL = [step for steps in STEPS.values() for step in steps]


class Checked:
    """What one run of the script with stubs did."""

    def __init__(
        self,
        folder: Path,
        *parts: str,
        gpu: bool = True,
        fails: str = "nothing",
        hangs: str = "nothing",
        seconds: int = 540,
        without: str | None = None,
        built: bool = False,
        script: Path = BENCHMARKS / "gpu_check.sh",
    ) -> None:
        programs, build, calls = folder / "bin", folder / "build/all", folder / "calls"
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
            "STUB_NOTED": str(self.results / "gpu_check.txt"),
            "STUB_KEPT": str(folder / "noted_before_speed"),
            "GPU_CHECK_BUILT": "yes" if built else "",
        }
        self.done = subprocess.run(
            [str(script), "-o", str(self.results), *parts],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        self.calls = calls.read_text(encoding="utf-8").splitlines()
        summary = self.done.stdout.rpartition("\nstep ")[2].splitlines()[1:]
        self.outcomes = {
            line.split()[0]: line.split(maxsplit=2)[2] for line in summary if line.split()[0] in ALL
        }


def test_the_script_is_well_formed() -> None:
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu_check.sh")], check=True)


def test_all_steps_run_in_order(tmp_path: Path) -> None:
    checked = Checked(tmp_path)
    assert checked.done.returncode == 0, checked.done.stdout + checked.done.stderr
    assert checked.outcomes == dict.fromkeys(ALL, "ok")
    assert list(checked.outcomes) == ALL
    results, build = checked.results, tmp_path / "build/all"
    with_gpu_tests = sorted(
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in file.read_text(encoding="utf-8")
    )
    assert len(with_gpu_tests) >= 3
    measured = checked.calls[7]
    assert checked.calls[2:7] + checked.calls[8:] == [
        f"cmake -S . -B {build} -G Ninja -DEMA_FUSED_CUDA=ON "
        f"-DEMA_FUSED_CUDA_ARCHITECTURES=90-real -DEMA_FUSED_TESTS=ON "
        f"-DPython_EXECUTABLE={tmp_path}/bin/python3 -Dpybind11_DIR=pybind11-here "
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BENCHMARKS.parent}/ema_fused",
        f"cmake --build {build} --target _C",
        # The files with such tests alone: others import frameworks that aren't there.
        f"python3 -m pytest -m gpu --rehearse -v -rfEs --tb=short -o faulthandler_timeout=60 "
        f"{' '.join(with_gpu_tests)}",
        f"cmake --build {build} --target gpu_update",
        "gpu_update ",
        *(
            f"compute-sanitizer --tool {tool} --error-exitcode 1 {build}/gpu_update"
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
    ]
    begun, _, ended = measured.partition(" --seconds ")
    assert begun == "python3 -m benchmarks --device cuda"
    assert ended.partition(" ")[2] == (
        f"--json {results}/gpu_nvidia_stub.json --markdown {results}/gpu_nvidia_stub.md"
    )
    assert 300 <= int(ended.partition(" ")[0]) <= 540  # what the sanitizers need is kept free
    # Few files, so that all of them can be carried back from a machine that is lent.
    names = ["gpu_check.txt", *(f"gpu_{part}.log" for part in STEPS)]
    assert sorted(file.name for file in results.iterdir()) == sorted(names)
    noted = (results / "gpu_check.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1].rstrip(":") for line in noted] == ALL
    log = (results / "gpu_sanitizers.log").read_text(encoding="utf-8")
    assert log.count("=== ") == 3


@pytest.mark.parametrize("part", ["correctness", "speed", "sanitizers"])
def test_parts_run_by_themselves(tmp_path: Path, part: str) -> None:
    checked = Checked(tmp_path, part)
    needs_program = ["build_program"] if part == "sanitizers" else []
    assert list(checked.outcomes) == STEPS["build"] + needs_program + STEPS[part]
    assert set(checked.outcomes.values()) == {"ok"}
    assert checked.done.returncode == 0


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "correct")
    assert checked.done.returncode == 2
    assert "usage: benchmarks/gpu_check.sh" in checked.done.stderr
    assert checked.calls == []


def test_what_was_built_elsewhere_is_taken(tmp_path: Path) -> None:
    checked = Checked(tmp_path, built=True)
    assert checked.outcomes == {
        step: "ok" for step in ALL if "build" not in step and step != "configure"
    }
    assert not any(call.startswith("cmake") for call in checked.calls)
    assert "python3 -c import ema_fused._C" in checked.calls


def test_a_killed_run_leaves_what_it_had(tmp_path: Path) -> None:
    Checked(tmp_path)
    noted = (tmp_path / "noted_before_speed").read_text(encoding="utf-8")
    assert [line.split()[1] for line in noted.splitlines()] == [
        f"{step}:" for step in ALL[: ALL.index("speed")]
    ]


@pytest.mark.parametrize(
    ("fails", "failed"),
    [
        ("--target _C", ["build", "tests", "speed"]),
        ("--target gpu", ["build_program", "update", "memcheck", "racecheck", "initcheck"]),
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


def test_without_a_gpu_the_script_rehearses_and_says_what_is_unmeasured(tmp_path: Path) -> None:
    checked = Checked(tmp_path, gpu=False)
    assert checked.done.returncode == 77
    assert list(checked.outcomes) == ALL
    rehearsed, no_gpu = "rehearsed on the CPU", "no GPU"
    assert checked.outcomes == dict.fromkeys(ALL, "ok") | {
        **dict.fromkeys(("tests", "speed"), rehearsed),
        **dict.fromkeys(("update", "memcheck", "racecheck", "initcheck"), no_gpu),
    }
    # One architecture is enough; and no file is named as that of a GPU.
    assert any("-DEMA_FUSED_CUDA_ARCHITECTURES=90-real" in call for call in checked.calls)
    (measured,) = (call for call in checked.calls if "-m benchmarks --" in call)
    assert measured.startswith("python3 -m benchmarks --rehearse --threads 1 --seconds ")
    assert measured.endswith(
        f"--json {checked.results}/rehearsal.json --markdown {checked.results}/rehearsal.md"
    )
    assert "what follows is a rehearsal" in checked.done.stdout
    assert "all of the speed is unmeasured" in checked.done.stdout.splitlines()[-1]


def test_a_rehearsal_puts_the_extension_back(tmp_path: Path) -> None:
    """In a copy of what the script needs."""
    for folder in ("benchmarks", "ema_fused", "tests"):
        (tmp_path / "copy" / folder).mkdir(parents=True)
    script = tmp_path / "copy/benchmarks/gpu_check.sh"
    shutil.copy(BENCHMARKS / "gpu_check.sh", script)
    extension = tmp_path / "copy/ema_fused/_C.stub.so"
    extension.write_text("the one that was there", encoding="utf-8")
    Checked(tmp_path, gpu=False, script=script)
    assert extension.read_text(encoding="utf-8") == "the one that was there"
    assert [file.name for file in extension.parent.iterdir()] == [extension.name]


def test_without_a_gpu_a_failed_build_is_a_failure(tmp_path: Path) -> None:
    checked = Checked(tmp_path, gpu=False, fails="--target _C")
    assert checked.done.returncode == 1
    assert checked.outcomes["build"] == "FAILED: status 3"


def test_a_step_that_hangs_is_stopped(tmp_path: Path) -> None:
    checked = Checked(tmp_path, hangs="gpu_update ", seconds=40)
    assert checked.done.returncode == 1
    assert checked.outcomes["update"] == "FAILED: stopped after 2 s"


@pytest.mark.skipif(
    shutil.which("compute-sanitizer", path="/usr/bin:/bin:/usr/local/cuda/bin") is not None,
    reason="compute-sanitizer is installed",
)
def test_a_missing_sanitizer_is_a_failure(tmp_path: Path) -> None:
    checked = Checked(tmp_path, without="compute-sanitizer")
    assert checked.done.returncode == 1
    assert "compute-sanitizer was not found" in checked.outcomes["memcheck"]
    assert checked.outcomes["speed"] == "ok"
