"""The files of a folder beside its weights, which a merged folder gets too: config, tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ema_fused.merging.recognising import is_checkpoint
from ema_fused.merging.stored_tensors import Contents

# Weights in any format, and what belongs to one moment of a training: none of it is averaged.
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|distcp)$")
_TRAINING = re.compile(r"^(optimizer|scheduler|scaler|rng_state|trainer_state)\b")
_INDEX = re.compile(r"\.index(\.[^.]+)?\.json$|^merge\.json$|^\.metadata$")


def files_beside(contents: Contents) -> dict[str, Path]:
    """The files to carry over, by their paths in the folder; in folders inside it too.

    Folders inside it that hold weights of their own aren't this checkpoint, which is told.
    """
    found: dict[str, Path] = {}
    others: list[str] = []
    for folder, inside, names in os.walk(contents.path):
        inside.sort()
        for name in [name for name in inside if _holds_weights(Path(folder, name))]:
            inside.remove(name)
            others.append(str(Path(folder, name).relative_to(contents.path)))
        for name in sorted(names):
            path = Path(folder, name)
            is_left_out = any(one.search(name) for one in (_WEIGHTS, _TRAINING, _INDEX))
            if path.is_file() and not is_left_out and path not in contents.files:
                found[str(path.relative_to(contents.path))] = path
    if others:
        warnings.warn(
            f"not carried over from {contents.path}, because they hold weights of their own: "
            f"{', '.join(others)}",
            stacklevel=4,
        )
    return found


def tell_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Puts the dtype into ``config.json``, which transformers loads the weights in."""
    file = folder / "config.json"
    if not file.is_file():
        return
    with contextlib.suppress(ValueError):  # it is no JSON, and so not transformers'
        config = json.loads(file.read_text(encoding="utf-8"))
        if _put_dtype(config, str(dtype).removeprefix("torch.")):
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _put_dtype(config: Any, name: str) -> bool:
    """Replaces the dtype of a model, and of the models that are parts of it; whether any was."""
    if not isinstance(config, dict):
        return False
    found = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    config.update(dict.fromkeys(found, name))
    inside = [_put_dtype(part, name) for key, part in config.items() if key.endswith("_config")]
    return bool(found) or any(inside)


def _holds_weights(folder: Path) -> bool:
    return any(_WEIGHTS.search(file.name) for file in folder.iterdir()) and is_checkpoint(folder)


def carry_over(files: Mapping[str, Path], folder: Path) -> None:
    """Copies the files, and what links point to, into ``folder``."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
