"""Averages of which each process has a part, in the checkpoints of frameworks.

Every process calls the functions that write or read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.engine.dtensors import is_sharded
from ema_fused.modules.sharding import is_flattened
from ema_fused.saving import checkpoints


def is_spread(average: object, model: nn.Module) -> bool:
    """Whether each process has only a part of the average of ``model``."""
    if not isinstance(average, BaseAveragedModel):
        return False
    return is_flattened(model) or any(map(is_sharded, average.module.state_dict().values()))


def check_can_be_saved(average: object, model: nn.Module) -> None:
    """Raises ValueError if FSDP1's averages have another dtype, at the start and not in hours."""
    if isinstance(average, BaseAveragedModel) and is_flattened(model):
        ours, theirs = (
            {one.dtype for one in module.parameters() if one.is_floating_point()}
            for module in (average.module, model)
        )
        if ours != theirs:
            raise ValueError(
                "averages of FSDP1's parameters can be saved in the parameters' dtype alone; leave "
                "averaged_dtype out, or shard the model by FSDP2 (fsdp_config's version 2)"
            )


def as_the_first_sees(seen: bool) -> bool:
    """The answer of the first process, in all of them: their file systems may differ in time."""
    told = [seen]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    return told[0]


def write_shards(average: Any, model: nn.Module, folder: Path) -> None:
    """Each process writes its own part of the average."""
    state = checkpoints.averaged_state_dict(average, model)
    checkpoints.save({"averaged": state}, folder)


def read_shards(average: Any, model: nn.Module, folder: Path) -> None:
    """Loads what :func:`write_shards` wrote, in any number of processes.

    Into the average's own memory, without the copy by which ``checkpoints.load_or_start`` leaves it
    unchanged if an error is raised: the training ends with one.

    Raises:
        RuntimeError: the average there doesn't match.
    """
    state = checkpoints.averaged_state_dict(average, model)
    try:
        checkpoints.load({"averaged": state}, folder)
    # torch's CheckpointException derives from BaseException.
    except CheckpointException as error:
        raise RuntimeError(
            f"the average in {folder} doesn't match the model in training, or files are missing: "
            f"{error}"
        ) from error
    checkpoints.load_averaged_state_dict(average, model, state)
