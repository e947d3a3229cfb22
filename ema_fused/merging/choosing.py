"""Which checkpoints a list of paths means: those of a run's folder, and their order."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ema_fused.merging.numbers_in_names import (
    is_in_order_of_text,
    kind_of,
    number_in,
    numbers_of,
)
from ema_fused.merging.recognising import Checkpoint, is_checkpoint, weights_in_folder
from ema_fused.merging.stored_tensors import StoredTensor

# Of several ranks or files: Megatron-LM's and DeepSpeed's, Hugging Face's, Llama's.
_PARTS = re.compile(
    r"(?<![a-z])(ranks?|shards?)(?![a-z])|\d{5}-of-\d{5}|^consolidated\.\d\d\b", re.IGNORECASE
)
# Files and folders that are called the same at every step: the folders around them are not.
_PLAIN_NAMES = (
    *("model", "pytorch_model", "adapter_model", "diffusion_pytorch_model", "checkpoint"),
    *("pytorch_model_fsdp_0", "averaged", "shards"),
)
_PIPELINE = "model_index.json"  # of diffusers: each of its models is a folder
_STEPS = ("step", "steps", "global_step", "iteration")


def chosen(
    paths: Sequence[Path],
    last: int | None = None,
    every: int | None = None,
    *,
    as_given: bool = False,
) -> list[Path]:
    """The checkpoints at ``paths``; folders of a run are replaced by the checkpoints in them.

    Args:
        paths: checkpoints, or folders that hold checkpoints with numbers in their names.
        last: only so many, the latest.
        every: only every so many-th, counted back from the latest, which is one of them.
        as_given: the order of ``paths`` is meant, even if a shell has listed them so.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: a folder holds no checkpoints, or two kinds; or a number is below 1.
    """
    for name, value in (("last", last), ("every", every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is expected")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is nothing at {path}")
    is_part = last is not None or every is not None
    runs = [_of_a_run(path, is_part=is_part) for path in paths]
    if not any(runs) and not as_given:
        paths = _by_numbers(paths)
    found = [one for path, inside in zip(paths, runs, strict=True) for one in inside or [path]]
    if len(paths) == 1 and not any(runs):
        _tell_of_run(paths[0])
    found = found[::-1][:: every or 1][::-1]
    if last is not None and last > len(found):
        warnings.warn(
            f"last is {last}, and there are {len(found)} checkpoints to take it of", stacklevel=3
        )
    found = found[-(last or len(found)) :]
    if not found:
        raise ValueError("no checkpoints were given; at least one path is expected")
    return found


def _of_a_run(path: Path, *, is_part: bool) -> list[Path] | None:
    """The checkpoints in a folder, in the order of the numbers in their names.

    None: the path is a checkpoint itself, and is meant as one.
    """
    if not path.is_dir() or (path / ".metadata").is_file():
        return None
    if (path / _PIPELINE).is_file():
        raise ValueError(
            f"{path} is a pipeline of several models; pass the folders of one of them, as "
            f"{path / 'unet'}"
        )
    # Trainers write the last model beside the folders of its checkpoints.
    is_one_itself = len(weights_in_folder(path)) == 1
    if is_one_itself and not is_part:
        return None
    kinds: dict[str, list[Path]] = {}
    for child in _numbered(path):
        kinds.setdefault(kind_of(child.name), []).append(child)
    if not kinds and is_one_itself:
        return None
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
    if all(_PARTS.search(child.name) for child in children):
        raise ValueError(
            f"{path} holds {kind}, which by their names are parts of one checkpoint, of its ranks "
            f"or shards, and can't be averaged with each other; pass checkpoints that are whole, "
            f"or one by one what is meant"
        )
    numbers = numbers_of([child.name for child in children])
    counts = Counter(numbers)
    twice = [
        child.name for number, child in zip(numbers, children, strict=True) if counts[number] > 1
    ]
    if twice:
        raise ValueError(
            f"{path} holds several checkpoints of one step ({', '.join(twice[:2])}); pass those "
            f"that are meant, one by one"
        )
    return [child for _, child in sorted(zip(numbers, children, strict=True))]


def _numbered(path: Path) -> list[Path]:
    """The checkpoints in a folder with a number in their names."""
    own = {file.name for group in weights_in_folder(path) for file in group if len(group) > 1}
    return [
        child
        for child in sorted(path.iterdir())
        # What a killed program has left, and was not finished, ends so.
        if number_in(child.name) is not None
        and child.name not in own
        and child.suffix not in (".partial", ".previous")
        and is_checkpoint(child)
    ]


def _by_numbers(paths: Sequence[Path]) -> Sequence[Path]:
    """The paths by their numbers, if they are in the order that a shell lists them in."""
    names = [str(path) for path in paths]
    if len({kind_of(name) for name in names}) != 1:
        return paths
    numbers = numbers_of(names)
    are_clear = len(set(numbers)) == len(numbers) and numbers != sorted(numbers)
    if not are_clear or not is_in_order_of_text(names):
        return paths
    ordered = [path for _, path in sorted(zip(numbers, paths, strict=True))]
    warnings.warn(
        f"given in the order of the text, as a shell lists names, and taken by the numbers in "
        f"them: from {ordered[0]} to {ordered[-1]}. Weights or steps that are given keep the order",
        stacklevel=4,
    )
    return ordered


def _tell_of_run(path: Path) -> None:
    """Warns if a folder that is a checkpoint itself holds the checkpoints of a run too."""
    inside = _numbered(path) if path.is_dir() and not (path / ".metadata").is_file() else []
    inside = [child for child in inside if child.is_dir() and len(weights_in_folder(child)) == 1]
    if inside:
        warnings.warn(
            f"{path} is a checkpoint itself, and is taken alone; it also holds {len(inside)} more, "
            f"as {inside[0].name}: --last N (last=) or --every N (every=) takes those",
            stacklevel=4,
        )


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
    name = path.stem
    while Path(name).stem in _PLAIN_NAMES:
        path = path.parent
        name = path.name
    return number_in(name)
