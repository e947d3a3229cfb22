"""Programs that tests of hooks start do without transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import processes


@pytest.fixture(scope="package", autouse=True)
def _without_transformers() -> Iterator[None]:
    with processes.without_transformers():
        yield
