"""Checkpoints on disk, in every format that the merge reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver

# Each a function (tensors, path) of the tests; ``sharded`` and ``folder`` write directories.
FORMATS = ("safetensors", "sharded", "folder", "torch", "nested", "distributed")
# What a merge writes, and its formats.
OUTPUTS = {
    "out.safetensors": "safetensors",
    "out.pt": "torch",
    "folder": "safetensors",
    "distributed": "distributed",
}


def state(seed: int, **more: Tensor) -> dict[str, Tensor]:
    """Weights of several dtypes and shapes, of no elements and of no dimension among them."""
    torch.manual_seed(seed)
    return {
        "layer.weight": torch.randn(37, 11),
        "layer.bias": torch.randn(11).to(torch.bfloat16),
        "half": torch.randn(5, 3, 7).to(torch.float16),
        "double": torch.randn(13, dtype=torch.float64),
        "scale": torch.randn(()),
        "empty": torch.empty(0, 3),
        "complex": torch.randn(4, 3, dtype=torch.complex64),
        "table": torch.arange(6).view(2, 3),
        "mask": torch.tensor([True, False, True]),
        **more,
    }


def save(tensors: Mapping[str, Tensor], path: Path, format: str, **beside: Any) -> Path:
    """Writes a checkpoint; ``beside``: what a nested one holds beside its weights."""
    if format == "safetensors":
        save_file(dict(tensors), path, metadata={"format": "pt"})
    elif format == "sharded":
        _save_sharded(tensors, path)
    elif format == "folder":
        path.mkdir()
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text('{"model_type": "small"}')
    elif format == "torch":
        torch.save(dict(tensors), path)
    elif format == "nested":
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        torch.save({"model": dict(tensors), "optimizer": optimizer, "step": 7, **beside}, path)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save(
                {"model": dict(tensors), **beside}, checkpoint_id=path, no_dist=True
            )
    return path


def _save_sharded(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.mkdir()
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    places: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def open_files() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
