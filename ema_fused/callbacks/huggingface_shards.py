"""Writes a sharded average for ``from_pretrained``, in all processes together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.callbacks.huggingface_files import (
    has_adapters,
    put_averaged_dtype,
    write_all_but_weights,
)
from ema_fused.modules.sharding import is_flattened
from ema_fused.saving import checkpoints
from ema_fused.saving.export import export_safetensors
from ema_fused.saving.first_process import by_the_first
from ema_fused.saving.replicas import MODULE


def write_whole(
    average: BaseAveragedModel, model: nn.Module, plain: nn.Module, folder: Path
) -> None:
    """Writes the averages for ``from_pretrained``, gathered tensor by tensor by the first process.

    FSDP1's, and PEFT's adapters, are gathered all at once, in the first process's host memory.

    Args:
        model: as it is trained.
        plain: the same without FSDP1's wrapper.
        folder: made if it isn't there; a folder of files, which are left alone, if it is.
    """
    beside = folder / "whole"
    with by_the_first() as is_first:
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
    if has_adapters(plain):
        gathered = _gathered(average, model)
        with by_the_first() as is_first:
            if is_first:
                named = {name.removeprefix(MODULE): one for name, one in gathered.items()}
                plain.save_pretrained(folder, state_dict=named)  # type: ignore[operator]
        return
    weights: Any = average.weights if hasattr(average, "weights") else average.module.state_dict()
    if is_flattened(model):
        weights = _gathered(average, model)
    export_safetensors(weights, beside)
    with by_the_first() as is_first:
        if is_first:
            write_all_but_weights(plain, folder)
            put_averaged_dtype(folder, average.module)
            for file in beside.iterdir():
                file.replace(folder / file.name)
            beside.rmdir()


def _gathered(average: BaseAveragedModel, model: nn.Module) -> dict[str, Tensor]:
    return checkpoints.averaged_state_dict(average, model, full_state_dict=True, cpu_offload=True)
