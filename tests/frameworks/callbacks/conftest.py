"""What the tests of this folder have in common: what they need, and that they use one thread."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests import ranks
from tests.ranks import Ranks

# Of the processes of sharded trainings.
SHARDED = ["tests.frameworks.callbacks.sharded_trainings"]

os.environ["HF_HUB_OFFLINE"] = "1"

NEEDED = {
    "accelerate": ["accelerate", "sklearn"],
    "huggingface": ["transformers", "accelerate", "sklearn"],
    "lightning": ["lightning.pytorch", "sklearn"],
    "trl": ["transformers", "accelerate", "peft"],
}


class _Tests(pytest.Module):
    """A file of tests, skipped before it is imported where a package is missing."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        for package in NEEDED[self.path.stem.split("_")[2]]:
            pytest.importorskip(package, reason=f"{package} is not installed")
        return super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = _Tests.from_parent(parent, path=module_path)
    return module


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every training here."""


@pytest.fixture(scope="session")
def two_trainers() -> Iterator[Ranks]:
    """Two processes that have imported transformers."""
    with ranks.started(2, imported=SHARDED) as processes:
        yield processes


@pytest.fixture(scope="session")
def four_trainers() -> Iterator[Ranks]:
    with ranks.started(4, imported=SHARDED) as processes:
        yield processes
