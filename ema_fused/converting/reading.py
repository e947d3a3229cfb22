"""Reads the average at a path: in pieces, or mapped into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_fused.converting.average_state import AverageState, Wanted, tensors_in
from ema_fused.converting.folders import tree_of_folder
from ema_fused.converting.recognising_averages import find
from ema_fused.converting.shadow_lists import names_for, with_names
from ema_fused.converting.shard_folders import tree_of_shards
from ema_fused.merging.recognising import PathLike, read_contents
from ema_fused.merging.stand_ins import stand_ins
from ema_fused.merging.stored_tensors import Contents, StoredTensor


def read_average(
    path: PathLike,
    *,
    key: str | None = None,
    source: str | None = None,
    averages_in: str | None = None,
    names: PathLike | Sequence[str] | None = None,
) -> AverageState:
    """The average in a checkpoint, none of its tensors read yet.

    Classes of other packages in a file of ``torch.save`` (histories, settings) are read as empty
    stand-ins, and no code of theirs is run: what needs ``weights_only=False`` elsewhere is safe.

    Args:
        path: a file or folder.
        key: where the average is in nested dictionaries; None: found.
        source: the name of its format; None: found. ``"weights"``: all tensors there are averages.
        averages_in: of mmcv 1.x, whose checkpoints don't tell: ``"parameters"`` or ``"buffers"``.
        names: of the parameters, for formats that are lists: names in order, or a file with one in
            each line, or a checkpoint of the model.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: it is damaged, or holds no average, or several.
    """
    tree, _ = read_tree(path)
    state = find(tree, Wanted(averages_in=averages_in), key=key, source=source, where=str(path))
    if state.unnamed is not None and names is not None:
        state = with_names(state, names_of(names, state))
    return state


def read_tree(path: PathLike) -> tuple[Mapping[Any, Any], Contents]:
    """All that is at a path, in nested dictionaries, tied tensors under each of their names."""
    path = Path(path)
    found = None
    if path.is_dir():
        found = tree_of_folder(path) or tree_of_shards(path, _read)
    if found is not None:
        return found
    contents = _read(path)
    if contents.tied:
        names = {name: contents.tree[kept] for name, kept in contents.tied.items()}
        return {**contents.tree, **names}, contents
    return contents.tree, contents


def _read(path: Path) -> Contents:
    with stand_ins(path, for_all=True):
        return read_contents(path)


def names_of(names: PathLike | Sequence[str], state: AverageState) -> list[str]:
    """The names of parameters in a file, or as they were passed."""
    if not isinstance(names, (str, os.PathLike)):
        return list(names)
    path = Path(names)
    if path.is_file() and not zipfile.is_zipfile(path):
        with contextlib.suppress(UnicodeDecodeError):
            lines = path.read_text(encoding="utf-8").split("\n")
            return [line.strip() for line in lines if line.strip()]
    tree, contents = read_tree(path)
    if contents.format != "torch" or state.unnamed is None:
        raise ValueError(
            f"{path} doesn't tell the parameters in their order; pass a file with one name in each "
            f"line, those of model.named_parameters(). For a source that is a list, a file of "
            f"torch.save with the model's state_dict does too"
        )
    inside = [tensors for tensors in _dictionaries(tree) if tensors]
    if len(inside) != 1:
        raise ValueError(
            f"{path} has {len(inside)} dictionaries of tensors; pass a file with the state_dict of "
            f"the model alone"
        )
    return names_for(state, inside[0])


def _dictionaries(tree: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    yield tensors_in(tree)
    for name, value in tree.items():
        if isinstance(value, Mapping) and "optim" not in str(name).lower():
            yield from _dictionaries(value)


# ---- Tensors of files, in memory when they are used ----------------------------------------------


class Mapped:
    """Tensors whose memory is the file: they are read when they are used, and not kept."""

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}
        self._made: dict[StoredTensor, Tensor] = {}

    def all(self, state: AverageState) -> AverageState:
        """The state with tensors in place of stored ones; tied ones are one tensor."""
        unnamed = None if state.unnamed is None else [self.tensor(one) for one in state.unnamed]
        raw = None if state.raw is None else self._tensors(state.raw)
        return dataclasses.replace(
            state,
            averaged=self._tensors(state.averaged),
            raw=raw,
            unnamed=unnamed,
            more=self._tensors(state.more),
        )

    def _tensors(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: self.tensor(tensor) for name, tensor in tensors.items()}

    def tensor(self, stored: Any) -> Tensor:
        """A tensor for ``stored``, which may be one already."""
        if isinstance(stored, Tensor):
            return stored
        if stored not in self._made:
            self._made[stored] = self._tensor(stored)
        return self._made[stored]

    def _tensor(self, stored: StoredTensor) -> Tensor:
        box = stored.boxes[0] if len(stored.boxes) == 1 else None
        if box is None or not box.is_contiguous or not stored.count:
            return stored.tensor()
        if box.start % stored.dtype.itemsize or box.path.stat().st_size < box.start + stored.bytes:
            return stored.tensor()  # which says what is wrong
        values = torch.frombuffer(
            self._memory(box.path), dtype=stored.dtype, count=stored.count, offset=box.start
        )
        return values.view(stored.shape)

    def _memory(self, path: Path) -> mmap.mmap:
        if path not in self._files:
            with path.open("rb") as file:
                # Copied where it is written, as torch wants memory that can be.
                self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._files[path]
