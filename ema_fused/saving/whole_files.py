"""Files and directories that are whole or not there, whatever stops the program."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """``with written_whole(path) as beside:`` what is written to ``beside`` becomes ``path``.

    At the end of the block, and on the disk by then: whatever stops the program, ``path`` is never
    half a file.
    """
    beside = path.with_name(f"{path.name}.partial")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def beside(path: Path) -> Path:
    """Where a directory is written before :func:`put_in_place` gives it its name."""
    return path.with_name(f"{path.name}.partial")


def begin_beside(path: Path) -> None:
    """Makes that directory, and deletes what an earlier program has left there."""
    shutil.rmtree(beside(path), ignore_errors=True)
    beside(path).mkdir(parents=True)


def put_in_place(path: Path) -> None:
    """Renames the directory beside ``path`` to ``path``, and deletes what ``path`` was before.

    A program stopped between two renames leaves the directory before, whole, where
    :func:`last_whole` finds it.
    """
    _sync_directory(beside(path))
    if path.exists():
        shutil.rmtree(_previous(path), ignore_errors=True)
        path.rename(_previous(path))
    beside(path).rename(path)
    _sync_directory(path.parent)
    shutil.rmtree(_previous(path), ignore_errors=True)


def last_whole(path: Path) -> Path:
    """``path``, or the directory that was there before where a program was stopped in between."""
    return _previous(path) if not path.exists() and _previous(path).exists() else path


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def _sync_directory(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
