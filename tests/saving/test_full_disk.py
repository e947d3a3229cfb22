"""A full disk, a real and small one: what merges, conversions and saves say and leave.

Where none can be mounted, limits on the size of files stand in for it, in the tests of merges.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests import processes
from tests.saving import full_disk_run
from tests.saving.full_disk_run import BEFORE, CONVERSIONS, MERGES, NEW

_NAMESPACE = ("unshare", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All that full_disk_run.py finds."""
    disk, folder = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("inputs")
    mount = [*_NAMESPACE, "mount", "-t", "tmpfs", "none", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"needs a namespace to mount a tmpfs in, and there is none here: {reason}")
    done = processes.finish(
        processes.start_program(*_NAMESPACE, sys.executable, full_disk_run.__file__, disk, folder)
    )
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def is_refusal(case: dict[str, Any]) -> bool:
    """Whether a clear error was raised, and all is as before."""
    is_told = case["is_os_error"] and "there is no room for" in case["told"]
    return is_told and "[Errno 28]" in case["told"] and case["is_as_before"]


@pytest.mark.parametrize("format", MERGES)
def test_a_merge_onto_a_full_disk_leaves_the_earlier_result(
    cases: dict[str, dict[str, Any]], format: str
) -> None:
    small = cases[f"{format} small"]
    assert is_refusal(small) and small["value"] == BEFORE
    assert "8,388," in small["told"]  # the bytes that are needed
    meanwhile = cases[f"{format} meanwhile"]
    if format == "safetensors":  # all its room was taken before
        assert meanwhile["told"] is None and meanwhile["value"] == NEW
    else:
        assert is_refusal(meanwhile) and meanwhile["value"] == BEFORE


def test_files_that_are_carried_over_need_room_too(cases: dict[str, dict[str, Any]]) -> None:
    carried = cases["folder carried"]
    assert is_refusal(carried) and carried["value"] == BEFORE
    assert "no room for 5,242," in carried["told"]


@pytest.mark.parametrize("format", CONVERSIONS)
def test_a_conversion_onto_a_full_disk_leaves_nothing(
    cases: dict[str, dict[str, Any]], format: str
) -> None:
    case = cases[f"convert {format}"]
    assert is_refusal(case) and case["value"] is None


@pytest.mark.parametrize("case", ["earlier", "new", "first", "second"])
def test_a_save_onto_a_full_disk_leaves_the_earlier_checkpoint(
    cases: dict[str, dict[str, Any]], case: str
) -> None:
    saved = cases[f"save {case}"]
    assert is_refusal(saved) and saved["value"] == (None if case == "new" else BEFORE)
    assert "8,388," in saved["told"]  # the bytes of the whole, also of each process
