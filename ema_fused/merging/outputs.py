"""Where a merged checkpoint goes: its format, its files, and what lies there already."""

from __future__ import annotations

import errno
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ema_fused.merging import writing_safetensors
from ema_fused.merging.carrying import carry_over, files_beside, tell_dtype
from ema_fused.merging.recognising import Checkpoint
from ema_fused.merging.results import RECORD_FILE, Merged, ResultTensor
from ema_fused.merging.safetensors_layout import DTYPES
from ema_fused.merging.stand_ins import holds_stand_in
from ema_fused.merging.stored_tensors import StoredTensor
from ema_fused.merging.streaming import Part
from ema_fused.saving import whole_files
from ema_fused.saving.full_disk import reserve, told_if_full
from ema_fused.saving.whole_files import written_whole

FORMATS = ("safetensors", "torch", "distributed")
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".bin": "torch",
    ".tar": "torch",  # timm's .pth.tar
}
_CONFIG = "config.json"
_TORCH_FILE = "model.pt"  # in a folder
_TORCH_FILE_OF_TRANSFORMERS = "pytorch_model.bin"


@dataclass(frozen=True)
class Target:
    """What will be written at ``goal``.

    Attributes:
        beside: files of the last input that a folder gets too, by their names in it.
        first_files: the file that each tensor is in, of the first input's folder.
        stem: how other files in a folder are called.
        dtype: that all floating-point tensors get; None: their own.
        place: as :class:`~ema_fused.merging.results.Merged` has it, and so ``others``.
    """

    goal: Path
    format: str
    is_folder: bool
    beside: Mapping[str, Path]
    first_files: Mapping[str, str]
    stem: str
    dtype: torch.dtype | None
    max_shard_bytes: int | None
    place: tuple[str, ...]
    others: Mapping[str, Any]

    def files(self, tensors: Mapping[str, ResultTensor]) -> dict[str, list[str]]:
        """The names of the tensors in each file, in the order in which their values are wanted."""
        if self.format != "safetensors":
            return {self._torch_file(): list(tensors)}
        if self.is_folder:
            return writing_safetensors.shards(
                tensors, self.first_files, self.max_shard_bytes, self.stem
            )
        return {self.goal.name: writing_safetensors.in_order(list(tensors), tensors)}

    def _torch_file(self) -> str:
        """As who reads the folder looks for it."""
        if self.stem in writing_safetensors.KEPT:
            return f"{self.stem}.bin"
        return _TORCH_FILE_OF_TRANSFORMERS if _CONFIG in self.beside else _TORCH_FILE

    def grain(self, shape: tuple[int, ...]) -> int:
        """Parts of a tensor of this shape begin and end at multiples of it."""
        if self.format != "distributed":
            return 1
        from ema_fused.merging.writing_distributed import grain_of

        return grain_of(shape)

    def write(
        self,
        merged: Merged,
        files: Mapping[str, list[str]],
        parts: Mapping[str, Sequence[Part]],
    ) -> None:
        """Writes everything, atomically.

        Args:
            merged: the tensors, in the order of ``files``.
            files: what :meth:`files` gave.
            parts: of each tensor, as their values come.

        Raises:
            OSError: the disk is full, or can't be written.
        """
        size = merged.bytes + sum(path.stat().st_size for path in self.beside.values())
        with told_if_full(self.goal, size), whole_files.nothing_left(self.goal):
            self._refuse_without_room(size, merged, files)
            if self.is_folder:
                self._write_folder(merged, files, parts)
            else:
                self._write_into(self.goal.parent, merged, {self.goal.name: [*merged.tensors]})

    def _refuse_without_room(
        self, size: int, merged: Merged, files: Mapping[str, list[str]]
    ) -> None:
        """Raises OSError if the disk, a quota or a limit is too small, before anything is read."""
        folder = self.goal.absolute().parent
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, "no room")
        with tempfile.TemporaryFile(dir=folder) as file:
            largest = (sum(merged.tensors[name].bytes for name in one) for one in files.values())
            reserve(file.fileno(), max(largest))

    def _write_folder(
        self,
        merged: Merged,
        files: Mapping[str, list[str]],
        parts: Mapping[str, Sequence[Part]],
    ) -> None:
        whole_files.begin_beside(self.goal)
        folder = whole_files.beside(self.goal)
        if self.format == "distributed":
            from ema_fused.merging import writing_distributed

            writing_distributed.write_folder(folder, merged, parts)
        else:
            self._write_into(folder, merged, files)
        carry_over(self.beside, folder)
        if self.dtype is not None:
            tell_dtype(folder, self.dtype)
        with written_whole(folder / RECORD_FILE) as beside:
            beside.write_text(f"{merged.record()}\n", encoding="utf-8")
        whole_files.put_in_place(self.goal)

    def _write_into(self, folder: Path, merged: Merged, files: Mapping[str, list[str]]) -> None:
        if self.format == "safetensors":
            writing_safetensors.write_files(folder, merged, files)
            return
        from ema_fused.merging import writing_torch

        for file in files:
            writing_torch.write_file(folder / file, merged)


def target_of(
    goal: Path,
    format: str | None,
    checkpoints: Sequence[Checkpoint],
    max_shard_bytes: int | None,
    dtype: torch.dtype | None = None,
) -> Target:
    """Decides what to write; arguments as :func:`~ema_fused.merging.merge_files.merge`.

    Raises:
        ValueError: the format is unknown, or doesn't go with the name.
        FileExistsError: there is something else at ``goal``.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is none of {', '.join(FORMATS)}")
    first, last = checkpoints[0], checkpoints[-1]
    by_name = _SUFFIXES.get(goal.suffix)
    chosen = format or by_name or _format_of_first(first)
    is_folder = by_name is None
    if chosen == "distributed" and not is_folder:
        raise ValueError(
            f"a distributed checkpoint is a folder, and {goal} has the name of a file; leave the "
            f"suffix out"
        )
    _refuse_to_replace(goal, is_folder=is_folder)
    if max_shard_bytes is not None and not (is_folder and chosen == "safetensors"):
        raise ValueError(
            f"max_shard_bytes is for safetensors files in a folder, and {goal} becomes something "
            f"else; leave it out, or name a folder"
        )
    first_files = {}
    is_safetensors = first.contents.format == "safetensors"
    is_of_ranks = any(len(tensor.boxes) > 1 for tensor in first.tensors.values())
    stem = "model"
    if first.path.is_dir() and first.contents.format != "distributed" and not is_of_ranks:
        stem = writing_safetensors.stem_of(
            first.contents.files[0].name, is_safetensors=is_safetensors
        )
    if is_safetensors and first.path.is_dir() and not is_of_ranks:
        first_files = {name: tensor.boxes[0].path.name for name, tensor in first.tensors.items()}
    beside = {}
    if is_folder and chosen != "distributed" and last.path.is_dir():
        beside = files_beside(last.contents)
    others = _others_to_write(chosen, last)
    place = first.place if chosen != "safetensors" else ()
    return Target(
        goal, chosen, is_folder, beside, first_files, stem, dtype, max_shard_bytes, place, others
    )


def _format_of_first(first: Checkpoint) -> str:
    # Folders with pytorch_model.bin become what everything reads that reads those.
    if first.contents.format == "torch" and first.path.is_dir():
        return "safetensors"
    return first.contents.format


def _refuse_to_replace(goal: Path, *, is_folder: bool) -> None:
    if not is_folder and goal.is_dir():
        raise FileExistsError(f"{goal} is a folder, and a file of this name is to be written")
    if is_folder and goal.exists() and not (goal / RECORD_FILE).is_file():
        if goal.is_dir() and not any(goal.iterdir()):
            return
        raise FileExistsError(
            f"{goal} exists and is no result of an earlier merge (it has no {RECORD_FILE}); remove "
            f"it, or write elsewhere"
        )


def _others_to_write(format: str, last: Checkpoint) -> dict[str, Any]:
    """What stands beside the tensors and can be written too; warns of the rest."""
    unread = [name for name, value in last.others.items() if holds_stand_in(value)]
    kept = {
        name: value
        for name, value in last.others.items()
        if format != "safetensors" and not _has_tensors(value) and name not in unread
    }
    lost = [name for name in last.others if name not in kept and name not in unread]
    if lost:
        warnings.warn(
            f"not written, because {format} files take only tensors here that are directly beside "
            f"the others: {', '.join(lost)} of {last.path}",
            stacklevel=2,
        )
    if unread:
        warnings.warn(
            f"not written, because objects of classes are not loaded: {', '.join(unread)} of "
            f"{last.path}",
            stacklevel=2,
        )
    return kept


def _has_tensors(value: Any) -> bool:
    if isinstance(value, StoredTensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_tensors, value))


def refuse_overlap(goal: Path, places: Sequence[Path]) -> None:
    """Raises ValueError if writing to ``goal`` would change an input; links are followed."""
    wanted = goal.resolve()
    for path in places:
        real = path.resolve()
        if wanted == real or wanted in real.parents or real in wanted.parents:
            raise ValueError(
                f"the output {goal} and the checkpoint {path} are the same, or one is inside the "
                f"other; write elsewhere"
            )


def refuse_overwriting(goal: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises ValueError if ``goal`` is a file that an input's folder links to."""
    wanted = goal.resolve()
    for checkpoint in checkpoints:
        if wanted in {file.resolve() for file in checkpoint.contents.files}:
            raise ValueError(
                f"the output {goal} is a file of the checkpoint {checkpoint.path}; write elsewhere"
            )


def refuse_unwritable(format: str, tensors: Mapping[str, ResultTensor]) -> None:
    """Raises ValueError if the format has no such dtype."""
    if format == "safetensors":
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise ValueError(
                    f"{name!r} has the dtype {tensor.dtype}, which safetensors files don't have; "
                    f"write a .pt file, or choose a dtype"
                )
