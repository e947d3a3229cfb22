"""What a merge that can't be done leaves behind: nothing, and it says why it couldn't."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ema_fused.merging import merge
from tests.merging.checkpoint_files import OUTPUTS, open_files, save, state


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    paths = [save({"w": torch.randn(50_000)}, tmp_path / f"{n}.pt", "torch") for n in range(2)]
    (tmp_path / "out").mkdir()
    with (
        at_most(100_000),
        pytest.raises(OSError, match="no room for 200,000 bytes, and nothing was written"),
    ):
        merge(paths, output=tmp_path / "out" / name, format=OUTPUTS[name])
    assert not any((tmp_path / "out").iterdir())


def test_a_disk_with_too_little_room_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [save(state(seed), tmp_path / f"{seed}.pt", "torch") for seed in (1, 2)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match="no room for"):
        merge(inputs, output=tmp_path / "o.pt", progress=lambda *_: pytest.fail("it was read"))


def test_no_thread_or_file_is_left_after_an_error(tmp_path: Path) -> None:
    paths = [save({"w": torch.ones(2**21)}, tmp_path / f"{n}.pt", "torch") for n in range(3)]
    broken = {"w": torch.ones(2**21)}
    broken["w"][5] = torch.nan
    paths.append(save(broken, tmp_path / "3.pt", "torch"))
    before = threading.active_count(), open_files()
    with pytest.raises(ValueError, match="element 5"):
        merge(paths, output=tmp_path / "o.pt")
    assert (threading.active_count(), open_files()) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_folders_made_for_the_output_are_not_left_after_an_error(tmp_path: Path, name: str) -> None:
    broken = save({"w": torch.tensor([1.0, torch.nan])}, tmp_path / "in.pt", "torch")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "there" / "new" / "run" / name
    with pytest.raises(ValueError, match="element 1"):
        merge([broken], output=output, format=OUTPUTS[name])
    assert sorted(tmp_path.rglob("*")) == before
    merge([broken], output=output, format=OUTPUTS[name], allow_nonfinite=True)
    assert output.exists()


def test_folders_that_others_use_meanwhile_are_left(tmp_path: Path) -> None:
    inputs = [save({"w": torch.ones(2)}, tmp_path / f"{n}.pt", "torch") for n in range(2)]

    def progress(*_: int) -> None:
        (tmp_path / "new" / "others").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(inputs, output=tmp_path / "new" / "run" / "out.pt", progress=progress)
    assert sorted((tmp_path / "new").rglob("*")) == [tmp_path / "new" / "others"]
