"""``pytest --rehearse``: what becomes of tests that need a GPU, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.slow

_TESTS = "each_average_reads or captured_random or a_side_stream"  # numbers, a graph, streams


def _outcome(*options: str | Path) -> str:
    file = "tests/gpu/test_gpu_execution.py"
    arguments = ("-m", "pytest", "-p", "no:cacheprovider", file, "-k", _TESTS, *options)
    return processes.run(*arguments, CUDA_VISIBLE_DEVICES="").stdout


def test_gpu_tests_run_on_the_cpu_up_to_what_needs_a_gpu(tmp_path: Path) -> None:
    without_package = tmp_path / "test_without_its_package.py"
    without_package.write_text("import pytest\n\npytest.importorskip('not_installed')\n")
    printed = _outcome("--rehearse", without_package)
    assert (
        "on CPU tensors 1 passed, 0 failed, 3 ran up to what needs a GPU (streams 2, graphs 1), "
        "0 skipped for other reasons"
    ) in printed
    assert "rehearsed up to here, where it needs graphs" in printed


def test_they_are_skipped_without_the_option() -> None:
    printed = _outcome()
    assert "4 skipped" in printed
    assert "needs a CUDA device, and torch sees none" in printed
    assert "rehearsal" not in printed
