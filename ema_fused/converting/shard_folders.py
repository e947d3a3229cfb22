"""Checkpoints of trainings in which our callbacks have written each rank's part of the average.

The average and the weights of the model are in two folders of ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ema_fused.merging.recognising import weights_in_folder
from ema_fused.merging.stored_tensors import Contents

Reader = Callable[[Path], Contents]
Tree = tuple[Mapping[Any, Any], Contents]

_AROUND = "weights around"
_AVERAGED = "averaged"  # the folder of our callbacks for transformers and accelerate
_SHARDS = "shards"
_TOLD = "averaged.json"  # of the Trainer's, beside its shards
_OF_ACCELERATE = "pytorch_model_fsdp_0"  # where it has each rank's part of the model
_NOTE = "weight_averaging.json"  # of Lightning's
_REST = "meta.pt"


def tree_of_shards(path: Path, read: Reader) -> Tree | None:
    """The average in a folder, with the weights beside it; None: it is no such checkpoint.

    Args:
        path: a folder: of a training's checkpoint, or of the average in it.
        read: reads a file or folder.
    """
    if (path / _NOTE).is_file():
        return _of_lightning(path, read)
    for at in (path, path / _AVERAGED):
        if (at / _TOLD).is_file() and _is_distributed(at / _SHARDS):
            return _with_weights(at / _SHARDS, at.parent, read)
    if _is_distributed(path / _AVERAGED) and not _is_distributed(path):
        return _with_weights(path / _AVERAGED, path, read)
    return None


def _is_distributed(path: Path) -> bool:
    return (path / ".metadata").is_file()


def _with_weights(shards: Path, around: Path, read: Reader) -> Tree:
    """The average, and the weights in the folder around it, if any are there."""
    found = read(shards)
    if _is_distributed(around / _OF_ACCELERATE):
        weights: Mapping[Any, Any] = read(around / _OF_ACCELERATE).tree
    elif len(weights_in_folder(around)) == 1:
        weights = read(around).tree
    else:
        return found.tree, found
    return {**found.tree, _AROUND: weights}, found


def _of_lightning(path: Path, read: Reader) -> Tree | None:
    """The keys of Lightning's own callback, which a folder has in several places."""
    note = json.loads((path / _NOTE).read_text(encoding="utf-8"))
    averaged, own = note.get("averaged"), note.get("own")
    if averaged is None:
        return None  # none had been made
    found = read(path / averaged)
    if averaged != ".":  # DeepSpeed's: the weights are in its optimizer's files
        return found.tree, found
    rest = read(path / _REST).tree if (path / _REST).is_file() else {}
    tree = {
        "state_dict": _model_in(found.tree),
        "current_model_state": {} if own is None else _model_in(read(path / own).tree),
        "averaging_state": rest.get("averaging_state", {}),
    }
    return tree, found


def _model_in(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The model's tensors, as one or the other strategy calls them."""
    for name in ("model", "state_dict"):
        if isinstance(tree.get(name), Mapping):
            inside: Mapping[Any, Any] = tree[name]
            return inside
    return tree
