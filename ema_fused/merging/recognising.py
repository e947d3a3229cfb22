"""What is at a path, by its content: the layout of a checkpoint, and the weights in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ema_fused.merging import safetensors_layout, torch_layout
from ema_fused.merging.rank_pieces import is_of_a_rank
from ema_fused.merging.safetensors_layout import is_safetensors
from ema_fused.merging.stored_tensors import Contents, StoredTensor, Unread

PathLike = str | os.PathLike[str]

# Looked at first, in this order, where a folder has several files of weights.
_USUAL = (
    "model.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
_INDEX = ".index.json"
_AN_INDEX = re.compile(r"\.(safetensors|bin)\.index(\.[^.]+)?\.json$")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint: tensors by name, none of them read yet.

    Attributes:
        contents: all that the checkpoint holds.
        key: where the weights are in it, as ``optimizer.model``; empty: at the top.
        tensors: by name, each tied tensor once.
        tied: for each further name of a tied tensor, its name in ``tensors``.
        others: what stands beside the tensors and is none: numbers, lists, extra state.
        place: the names that ``key`` is made of.
        copied: names of tensors that were copied, not averaged, by the average that is saved here.
        versions: of the modules, as ``state_dict()._metadata`` tells them.
    """

    contents: Contents
    key: str
    tensors: Mapping[str, StoredTensor]
    tied: Mapping[str, str]
    others: Mapping[str, Any]
    place: tuple[str, ...] = ()
    copied: frozenset[str] = frozenset()
    versions: Any = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        return self.contents.path

    @property
    def bytes(self) -> int:
        """The size of the tensors, in bytes."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def open_checkpoint(path: PathLike, key: str | None = None) -> Checkpoint:
    """The names, dtypes and shapes of the weights in a checkpoint, and where their values are.

    Args:
        path: a file or folder: safetensors in one file or several with an index, a folder of
            Hugging Face or PEFT, a file of ``torch.save``, a folder of
            ``torch.distributed.checkpoint``; exports, snapshots and states of averages among them.
        key: where the weights are in nested dictionaries, as ``model`` or ``ema.shadow``; ``""``
            for the top. None: where the only dictionary with floating-point tensors is.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: it is no checkpoint, or is damaged, or ``key`` fits nothing or is needed.
        ImportError: safetensors is not installed.
    """
    return choose(read_contents(path), key)


def read_contents(path: PathLike) -> Contents:
    """All that a checkpoint holds, in nested dictionaries; arguments as :func:`open_checkpoint`."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    found = _read_files(path, [path])
    if found is None:
        raise ValueError(
            f"{path} is neither a safetensors file nor one of torch.save; expected is one of them, "
            f"or a folder of Hugging Face, PEFT or torch.distributed.checkpoint"
        )
    return found


def is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint at ``path``, as far as names and first bytes tell."""
    if path.is_dir():
        return bool(weights_in_folder(path))
    return path.is_file() and _format_of(path) is not None


def _format_of(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(16)
    if is_safetensors(head):
        return "safetensors"
    # A pickle is recognised too, so that it is refused by name.
    return "torch" if head.startswith((b"PK\x03\x04", b"\x80")) else None


def _read_files(path: Path, files: list[Path]) -> Contents | None:
    """The contents of the files, which are of one format; None: they are of no known one."""
    format = _format_of(files[0])
    if format == "safetensors":
        return safetensors_layout.read_files(path, files)
    if format is None:
        return None
    parts = [torch_layout.read_file(file) for file in files]
    if len(parts) == 1:
        return Contents(path, "torch", parts[0].tree, tuple(files), {}, {})
    tree = {name: value for part in parts for name, value in part.tree.items()}
    return Contents(path, "torch", tree, tuple(files), {}, {})


def _read_folder(path: Path) -> Contents:
    if (path / ".metadata").is_file():
        from ema_fused.merging import distributed_layout  # takes most of a second to import

        return distributed_layout.read_folder(path)
    groups = weights_in_folder(path)
    inside = [one.name for one in sorted(path.iterdir()) if (one / ".metadata").is_file()]
    if len(groups) != 1 and inside:
        # As accelerate has the weights and the optimizer's state, under FSDP.
        raise ValueError(
            f"{path} is no checkpoint itself, and holds some of torch.distributed.checkpoint in "
            f"folders ({', '.join(inside)}); pass one of them"
        )
    if not groups:
        raise ValueError(
            f"{path} holds no checkpoint: neither files of weights (safetensors, torch.save) nor "
            f"the .metadata of torch.distributed.checkpoint"
        )
    if len(groups) > 1:
        names = ", ".join(group[0].name for group in groups)
        raise ValueError(f"{path} holds several files of weights ({names}); pass one of them")
    found = _read_files(path, groups[0])
    assert found is not None
    return found


def weights_in_folder(path: Path) -> list[list[Path]]:
    """The files of weights in a folder, those of one model together."""
    return list(_weights_of_folder(path))


def _weights_of_folder(path: Path) -> Iterator[list[Path]]:
    if (path / ".metadata").is_file():
        yield [path / ".metadata"]
        return
    for name in _USUAL:
        index = path / f"{name}{_INDEX}"
        if index.is_file():
            yield _files_in(index)
            return
        if (path / name).is_file() and _format_of(path / name) is not None:
            yield [path / name]
            return
    # Of a variant: model.safetensors.index.fp16.json
    indices = sorted(one for one in path.glob("*.index*.json") if _AN_INDEX.search(one.name))
    if indices:
        yield from map(_files_in, indices)
        return
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    pieces = [file for file in files if is_of_a_rank(file)]
    if pieces:
        yield pieces
    for file in files:
        # Not by its name: others, as those of an optimizer, are opened and looked into later.
        if file not in pieces and _format_of(file) is not None:
            yield [file]


def _files_in(index: Path) -> list[Path]:
    """The files that an index names, in order.

    Raises:
        ValueError: it is no index, or files are missing or lie elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of files of weights ({error!r})") from error
    for name in names:
        if name != Path(name).name or not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name!r}, and there is no such file beside it")
    if not names:
        raise ValueError(f"{index} names no files of weights")
    return [index.parent / name for name in names]


# ---- Where in it the weights are -----------------------------------------------------------------


def choose(contents: Contents, key: str | None = None) -> Checkpoint:
    """The weights in a checkpoint; arguments and errors as :func:`open_checkpoint`."""
    if key is None:
        key = _only_candidate(contents)
    place, inside = _at(contents.tree, key) or ((), {})
    for value in inside.values():
        if isinstance(value, Unread):
            raise ValueError(value.problem)
    if not _has_tensors(inside):
        told = ", ".join(map(repr, candidates(contents))) or "none"
        raise ValueError(
            f"{contents.path} has no dictionary of tensors at key {key!r}; there are: {told}"
        )
    tensors: dict[str, StoredTensor] = {}
    tied = dict(contents.tied)
    others: dict[str, Any] = {}
    names: dict[StoredTensor, str] = {}
    for name, value in inside.items():
        if not isinstance(value, StoredTensor):
            others[str(name)] = value
        elif value.count and value in names:
            tied[str(name)] = names[value]
        else:
            names[value] = str(name)
            tensors[str(name)] = value
    return Checkpoint(
        contents,
        key,
        tensors,
        tied,
        others,
        place,
        safetensors_layout.copied_names(dict(contents.metadata)),
        getattr(inside, "versions", None),
    )


def candidates(contents: Contents) -> list[str]:
    """The keys of all dictionaries that hold floating-point tensors; not those of optimizers.

    If no dictionary holds any of more than no dimension, those that hold any tensors.
    """
    wanted = [_has_weights, _has_tensors]
    for is_wanted in wanted:
        found = [key for key, inside in _dictionaries("", contents.tree) if is_wanted(inside)]
        if found:
            return found
    return []


def _only_candidate(contents: Contents) -> str:
    found = candidates(contents)
    if not found:
        raise ValueError(f"{contents.path} holds no tensors, or those of an optimizer alone")
    if len(found) > 1:
        raise ValueError(
            f"{contents.path} holds several dictionaries of tensors; choose one by key: "
            f"{', '.join(map(repr, found))}"
        )
    return found[0]


def _has_weights(inside: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(value, StoredTensor)
        and value.shape
        and (value.dtype.is_floating_point or value.dtype.is_complex)
        for value in inside.values()
    )


def _has_tensors(inside: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, StoredTensor) for value in inside.values())


def _dictionaries(key: str, inside: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All dictionaries with names for keys, and where they are."""
    yield key, inside
    for name, value in inside.items():
        if isinstance(name, str) and isinstance(value, Mapping) and "optim" not in name.lower():
            yield from _dictionaries(f"{key}.{name}" if key else name, value)


def _at(inside: Any, key: str) -> tuple[tuple[str, ...], Mapping[Any, Any]] | None:
    """The dictionary at a key, and the names that lead to it; names may have dots in them."""
    if not isinstance(inside, Mapping):
        return None
    if not key:
        return (), inside
    for name, value in inside.items():
        if isinstance(name, str) and (key == name or key.startswith(f"{name}.")):
            found = _at(value, key[len(name) + 1 :])
            if found is not None:
                return (name, *found[0]), found[1]
    return None
