"""Which checkpoints a list of paths means: those of a run's folder, and their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ema_fused.merging.recognising import Checkpoint, is_checkpoint, weights_in_folder
from ema_fused.merging.stored_tensors import StoredTensor

_NUMBER = re.compile(r"\d+")
# Of several ranks or files: Megatron-LM's and DeepSpeed's, Hugging Face's, Llama's.
_PARTS = re.compile(
    r"(?<![a-z])(ranks?|shards?)(?![a-z])|\d{5}-of-\d{5}|^consolidated\.\d\d\b", re.IGNORECASE
)
# Files and folders that are called the same at every step: the folders around them are not.
_PLAIN_NAMES = (
    *("model", "pytorch_model", "adapter_model", "diffusion_pytorch_model", "checkpoint"),
    *("pytorch_model_fsdp_0", "averaged", "shards"),
)
_STEPS = ("step", "steps", "global_step", "iteration")


def chosen(paths: Sequence[Path], last: int | None = None, every: int | None = None) -> list[Path]:
    """The checkpoints at ``paths``; folders of a run are replaced by the checkpoints in them.

    Args:
        paths: checkpoints, or folders that hold checkpoints with numbers in their names.
        last: only so many, the latest.
        every: only every so many-th, counted back from the latest, which is one of them.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: a folder holds no checkpoints, or two kinds; or a number is below 1.
    """
    for name, value in (("last", last), ("every", every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is expected")
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is nothing at {path}")
        found += _of_a_run(path) if _is_run(path) else [path]
    found = found[::-1][:: every or 1][:last][::-1]
    if not found:
        raise ValueError("no checkpoints were given; at least one path is expected")
    return found


def _is_run(path: Path) -> bool:
    if not path.is_dir() or (path / ".metadata").is_file():
        return False
    return len(weights_in_folder(path)) != 1


def _of_a_run(path: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of the last number in their names."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for child in sorted(path.iterdir()):
        numbers = _NUMBER.findall(child.name)
        # What a killed program has left, and was not finished, ends so.
        if numbers and child.suffix not in (".partial", ".previous") and is_checkpoint(child):
            kind = _NUMBER.sub("*", child.name)
            kinds.setdefault(kind, []).append((int(numbers[-1]), child))
    if not kinds:
        raise ValueError(
            f"{path} is no checkpoint, and holds none with a number in its name, as step-1000"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds several kinds of checkpoints ({', '.join(sorted(kinds))}); pass those "
            f"that are meant, one by one"
        )
    ((kind, children),) = kinds.items()
    if all(_PARTS.search(child.name) for _, child in children):
        raise ValueError(
            f"{path} holds {kind}, which by their names are parts of one checkpoint, of its ranks "
            f"or shards, and can't be averaged with each other; pass checkpoints that are whole, "
            f"or one by one what is meant"
        )
    return [child for _, child in sorted(children)]


def step_of(checkpoint: Checkpoint) -> int | None:
    """The step of training, as the contents or else the name tells it; None: neither does."""
    told = checkpoint.contents.metadata.get("steps")
    if told is not None and told.isdecimal():
        return int(told)
    for name in _STEPS:
        for inside in (checkpoint.contents.tree, checkpoint.others, checkpoint.tensors):
            value = inside.get(name)
            if isinstance(value, StoredTensor) and value.count == 1 and not value.dtype.is_complex:
                return int(value.tensor())
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    path = checkpoint.path
    while path.stem in _PLAIN_NAMES:
        path = path.parent
    numbers = _NUMBER.findall(path.stem)
    return int(numbers[-1]) if numbers else None
