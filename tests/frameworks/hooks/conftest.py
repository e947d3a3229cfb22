"""What tests of hooks do without: transformers in programs, what mmengine makes for each runner."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

import pytest

from tests import processes


@pytest.fixture(scope="package", autouse=True)
def _without_transformers() -> Iterator[None]:
    with processes.without_transformers():
        yield


@pytest.fixture(scope="package", autouse=True)
def _made_once_for_all_runners() -> Iterator[None]:
    """What mmengine asks git and compilers, which takes more than a test; figures to draw on."""
    try:
        from mmengine.hooks import runtime_info_hook
        from mmengine.runner import runner
        from mmengine.visualization import Visualizer
    except ImportError:
        yield
        return
    make = Visualizer._initialize_fig
    made = functools.cache(lambda: make(None, {"frameon": False}))
    git_hash = functools.cache(runner.get_git_hash)
    with (
        mock.patch.object(Visualizer, "_initialize_fig", lambda self, options: made()),
        mock.patch.object(runner, "collect_env", functools.cache(runner.collect_env)),
        mock.patch.object(runner, "get_git_hash", git_hash),
        mock.patch.object(runtime_info_hook, "get_git_hash", git_hash),
    ):
        yield
