"""The files that test, build and publish elsewhere, as far as that can be known from here: they
have the form that their readers ask for, and what they name exists."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def run(*command: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def jobs(workflow: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"])


def steps() -> list[dict[str, Any]]:
    return [
        step for file in WORKFLOWS for job in jobs(file).values() for step in job.get("steps", ())
    ]


def commands() -> list[list[str]]:
    """What is run, split into words."""
    lines = "\n".join(step.get("run", "") for step in steps()).splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def test_there_is_one_for_each_purpose() -> None:
    assert [file.stem for file in WORKFLOWS] == ["documentation", "publish", "test", "wheels"]


def test_workflows_have_the_form_that_is_asked_for() -> None:
    check = Path(sysconfig.get_path("scripts")) / "check-jsonschema"
    run(check, "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)


def test_every_job_has_a_limit_of_time_and_no_rights_but_its_own() -> None:
    for file in WORKFLOWS:
        whole = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert whole["permissions"] == {"contents": "read"}, file
        for name, job in whole["jobs"].items():
            assert "uses" in job or "timeout-minutes" in job, (file, name)
            if set(job.get("permissions", {})) - {"contents"}:
                assert name == "publish" and "environment" in job, (file, name)


def test_what_they_run_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command
        elif command[0].startswith("."):
            assert (ROOT / command[0]).is_file(), command
        else:
            assert command[0] in ("python", "mkdir", "cp", "cd", "grep"), command
        for word in command[1:]:
            if re.match(r"(tests|requirements)/|pyproject", word):
                assert (ROOT / word).exists(), command


def test_every_pairing_of_python_and_torch_is_tested() -> None:
    (test,) = (file for file in WORKFLOWS if file.stem == "test")
    matrix = jobs(test)["versions"]["strategy"]["matrix"]
    constraints = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    oldest, newest_tested = matrix["torch"][:2]
    assert matrix["python"] == PYTHONS
    assert f"torch>={oldest.removesuffix('.0')}" in PROJECT["project"]["dependencies"]
    assert f"torch=={newest_tested}\n" in constraints
    assert matrix["torch"][2:] == ["newest"]


def test_wheels_are_built_for_every_python_and_processor() -> None:
    """cibuildwheel reads its configuration here, and refuses what it doesn't know."""
    printed = run(
        *(sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"),
        *("--platform", "linux", "--archs", "x86_64,aarch64"),
    )
    pythons = [f"cp{version.replace('.', '')}" for version in (*PYTHONS, "3.14t")]
    processors = ["x86_64", "aarch64"]
    expected = {f"{p}-manylinux_{m}" for p, m in itertools.product(pythons, processors)}
    assert set(printed.split()) == expected
    assert {c.split(" :: ")[-1] for c in PROJECT["project"]["classifiers"]} >= set(PYTHONS)
    (wheels,) = (file for file in WORKFLOWS if file.stem == "wheels")
    built_on = jobs(wheels)["wheels"]["strategy"]["matrix"]["include"]
    assert [entry["processor"] for entry in built_on] == processors


def test_wheels_are_built_with_cuda_or_not_at_all() -> None:
    linux = PROJECT["tool"]["cibuildwheel"]["linux"]
    assert linux["environment"] == {
        "CUDA_HOME": "/opt/cuda/nvidia/cu13",
        "EMA_FUSED_CUDA": "1",
        "EMA_FUSED_NATIVE": "1",
    }
    assert "requirements/cuda.txt" in linux["before-all"]
    assert linux["manylinux-x86_64-image"] == linux["manylinux-aarch64-image"] == "manylinux_2_28"


@pytest.mark.parametrize("package", ["auditwheel", "build", "cibuildwheel", "check-jsonschema"])
def test_the_tools_are_pinned(package: str) -> None:
    constraints = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(rf"^{package}==", constraints, re.MULTILINE)
