"""The files of a folder beside its weights, which a merged folder gets too: config, tokenizer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ema_fused.merging.stored_tensors import Contents

# Weights in any format, and what belongs to one moment of a training: none of it is averaged.
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|distcp)$")
_TRAINING = re.compile(r"^(optimizer|scheduler|scaler|rng_state|trainer_state)\b")
_INDEX = re.compile(r"\.index\.json$|^merge\.json$|^\.metadata$")


def files_beside(contents: Contents) -> dict[str, Path]:
    """The files to carry over, by their paths in the folder; in folders inside it too."""
    found: dict[str, Path] = {}
    for folder, _, names in os.walk(contents.path):
        for name in sorted(names):
            path = Path(folder, name)
            is_left_out = any(one.search(name) for one in (_WEIGHTS, _TRAINING, _INDEX))
            if path.is_file() and not is_left_out and path not in contents.files:
                found[str(path.relative_to(contents.path))] = path
    return found


def carry_over(files: Mapping[str, Path], folder: Path) -> None:
    """Copies the files, and what links point to, into ``folder``."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
