"""Objects of classes in files of ``torch.save``, read as empty stand-ins.

Trainers save settings and histories beside the weights: timm an ``argparse.Namespace``, mmengine
its log, Lightning what a model was made with. ``torch.load(weights_only=True)`` refuses such files.
What is called here in place of a class or function of the file is a class made here, so nothing of
the file, and nothing that it names, is run or imported.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

# What trainers write beside weights. Bound methods are in mmengine's histories: hence getattr.
_OF_TRAINERS = re.compile(
    r"(mmengine|mmcv|omegaconf|lightning|lightning_fabric|lightning_utilities|pytorch_lightning"
    r"|transformers|accelerate|datetime|typing)\..+"
    r"|argparse\.Namespace|types\.SimpleNamespace|copyreg\._reconstructor|_codecs\.encode"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)Path"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|_?core\.multiarray\.(_reconstruct|scalar))"
    r"|builtins\.(getattr|object|dict|list|tuple|set|frozenset|int|float|complex|bool|str|bytes)"
)
# Modules with classes of tensors of which each rank has a part.
OF_SHARDS = (
    "torch.distributed.tensor",
    "torch.distributed._shard",
    "ema_fused.engine.flat_shards",
)


@contextlib.contextmanager
def stand_ins(path: Path, *, for_all: bool) -> Iterator[None]:
    """Within the block ``torch.load(weights_only=True)`` reads unknown classes as empty objects.

    Args:
        path: of the file.
        for_all: of whatever the file names; else only of what trainers write.
    """
    unknown: list[str] = []
    with contextlib.suppress(Exception):  # a damaged file is refused by its reader
        if path.is_file() and zipfile.is_zipfile(path):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # Not of tensors: without their values nobody would know that some are missing.
    names = [
        name
        for name in unknown
        if (for_all and not name.startswith(OF_SHARDS)) or _OF_TRAINERS.fullmatch(name)
    ]
    allowed: list[Any] = [(type("StandIn", (StandIn,), {}), name) for name in names]
    with torch.serialization.safe_globals(allowed):
        yield


class StandIn:
    """In place of an object of an unknown class."""

    def __new__(cls, *_: object, **__: object) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def holds_stand_in(value: Any) -> bool:
    """Whether it, or something in it, isn't what was saved."""
    if isinstance(value, Mapping):
        return any(map(holds_stand_in, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(holds_stand_in, value))
    return isinstance(value, StandIn) or (isinstance(value, type) and issubclass(value, StandIn))
