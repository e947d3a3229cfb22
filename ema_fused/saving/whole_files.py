"""Writes files and directories atomically: complete or absent, even if the program is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """``with written_whole(path) as beside:`` the file written to ``beside`` becomes ``path``.

    At the end of the block it is synchronised to the disk and then renamed: ``path`` is never half
    a file, even if the program is killed.
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


@contextmanager
def nothing_left(path: Path) -> Iterator[None]:
    """Makes the directories around ``path``; a block that raises leaves none of them behind it.

    Nor the temporary directory that :func:`begin_beside` makes.
    """
    absent = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        shutil.rmtree(beside(path), ignore_errors=True)
        with suppress(OSError):  # another program has put something there meanwhile
            for parent in absent:
                parent.rmdir()
        raise


def beside(path: Path) -> Path:
    """The temporary path of a directory, until :func:`put_in_place` renames it."""
    return path.with_name(f"{path.name}.partial")


def begin_beside(path: Path) -> None:
    """Makes that directory, and deletes one left there by a killed program."""
    shutil.rmtree(beside(path), ignore_errors=True)
    beside(path).mkdir(parents=True)


def put_in_place(path: Path) -> None:
    """Renames the directory beside ``path`` to ``path``, and deletes the previous ``path``.

    If the program is killed between the two renames, the previous directory is complete under
    another name, and :func:`last_whole` finds it.
    """
    _sync_directory(beside(path))
    if path.exists():
        shutil.rmtree(_previous(path), ignore_errors=True)
        path.rename(_previous(path))
    beside(path).rename(path)
    _sync_directory(path.parent)
    shutil.rmtree(_previous(path), ignore_errors=True)


def last_whole(path: Path) -> Path:
    """``path``; if a program was killed between the two renames, the previous directory."""
    return _previous(path) if not path.exists() and _previous(path).exists() else path


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def _sync_directory(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
