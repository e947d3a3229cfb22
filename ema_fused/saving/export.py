"""Averaged weights for inference: in the plain model's own format, and as safetensors files.

The files are named as Hugging Face names them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_fused.engine.dtensors import is_sharded, local, placed_as
from ema_fused.engine.flat_shards import FlatShard
from ema_fused.modules.module_pairs import Kind, Slot, slots_of
from ema_fused.modules.naming import match_names
from ema_fused.modules.sharding import drop_gathered, is_flattened
from ema_fused.modules.skeleton import wrapped_by
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.saving import whole_files
from ema_fused.saving.first_process import by_the_first
from ema_fused.saving.replicas import MODULE, refuse_differing
from ema_fused.saving.safetensors_files import safetensors

__all__ = ["export_safetensors", "model_state_dict"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")


def model_state_dict(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """``model.state_dict()`` with averaged weights in place of the model's own.

    Modules may rename, split or join tensors when their state is taken (hooks, fused projections),
    and may keep state beside tensors (``get_extra_state``). Averages are kept by the names of the
    parameters and know nothing of either. The result has the model's own format, so that a plain
    model loads it strictly, and the model's present extra state::

        plain.load_state_dict(model_state_dict(model, averaged.weights))

    The model holds the averages while its state is taken, so no other thread may use it meanwhile;
    its tensors aren't written.

    Args:
        model: the model that was averaged, or another of the same structure. If it is wrapped, the
            names are those of the model inside.
        weights: ``averaged.weights``, ``PowerFunctionEMA.average(sigma_rel)``, or what
            ``reconstruct()`` returns. (An average that keeps a copy of the module has all that
            already: ``averaged.module.state_dict()``.)

    Returns:
        The state dict, in the dtypes and on the devices of ``weights``; the tensors aren't copies.

    Raises:
        KeyError: names don't match.
        TypeError: FSDP1 has flattened the model's parameters.
        RuntimeError: averaged weights are swapped into the model.
    """
    refuse_while_swapped("model_state_dict() was called", model)
    if is_flattened(model):
        raise TypeError(
            "FSDP1 has flattened the model's parameters, and they have no places for averages; "
            "take averaged_state_dict(averaged, model, full_state_dict=True) of "
            "ema_fused.checkpoints"
        )
    drop_gathered(model)
    plain, inside = model, wrapped_by(model)
    while inside is not None:
        plain, inside = inside, wrapped_by(inside)
    slots = slots_of(plain, leave=(Kind.CACHE,))
    names = match_names(dict.fromkeys(weights, True), dict.fromkeys(slots, True))
    try:
        for name, own in names.items():
            _put(slots[own], weights[name])
        return dict(plain.state_dict())
    finally:
        for slot in slots.values():
            _put(slot, slot.tensor)


def _put(slot: Slot, tensor: Tensor) -> None:
    """Makes a module hold ``tensor`` there, whatever its class."""
    held: Any = slot.owner._parameters if slot.kind is Kind.PARAMETER else slot.owner._buffers
    held[slot.key] = tensor


@torch.no_grad()
def export_safetensors(
    weights: Mapping[str, Tensor],
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    check_replicas: bool = True,
) -> list[Path]:
    """Writes ``weights`` into ``directory``: ``model.safetensors``, or several files and an index.

    Every process calls it. DTensors are gathered one by one by all processes, and the first process
    writes them; it holds the tensors of one file in memory at a time, and temporarily one more.
    Tied tensors are written once for each name::

        export_safetensors(averaged.weights, "run/inference", dtype=torch.bfloat16)

    Args:
        weights: ``averaged.weights`` of any model but FSDP1's; or the result of
            :func:`~ema_fused.saving.checkpoints.averaged_state_dict`, for FSDP1 with
            ``full_state_dict=True``: its ``module.*`` are written, under the model's names. Plain
            tensors are taken from the first process.
        directory: on a file system of the first process. Written atomically: complete or absent.
            Replaced if it holds nothing but an earlier export.
        dtype: of the floating-point tensors in the files; None: their own.
        max_shard_bytes: largest total size of the tensors in one file, in bytes; a larger tensor
            gets a file of its own.
        check_replicas: refuse plain tensors that differ between the processes: only the first
            process's would be written. Integers and batch norm's statistics may differ.

    Returns:
        The paths of the files with weights, in order, in every process.

    Raises:
        ValueError: there are no weights, a tensor is on the meta device, or an argument is out of
            its range.
        TypeError: a weight is no tensor, or of a kind that can't be gathered.
        FileExistsError: ``directory`` holds something other than an export.
        ImportError: safetensors is not installed.
        RuntimeError: another process raised one of these, or couldn't write; or the processes pass
            different DTensors, or different plain tensors. The directory is unchanged then.
    """
    goal = Path(directory)
    tensors = _of_the_model(weights)
    _agree_on(tensors, dtype, max_shard_bytes)
    if check_replicas:
        refuse_differing(tensors)
    beside = whole_files.beside(goal)
    with ExitStack() as stack:
        with by_the_first() as is_first:
            if is_first:
                _refuse_to_replace(goal)
                stack.enter_context(whole_files.nothing_left(goal))
                whole_files.begin_beside(goal)
        files = _files(tensors, dtype, max_shard_bytes)
        for file, names in files.items():
            _write(beside / file, tensors, names, dtype)
        with by_the_first() as is_first:
            if is_first:
                if len(files) > 1:
                    _write_index(beside / _INDEX, files, tensors, dtype)
                whole_files.put_in_place(goal)
    return [goal / file for file in files]


def _of_the_model(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors; from an averaged model's state, ``module.*`` without the prefix."""
    inside = {
        name.removeprefix(MODULE): tensor
        for name, tensor in weights.items()
        if name.startswith(MODULE)
    }
    own = [name for name in weights if not name.startswith(MODULE)]
    is_averaged = "steps" in own and not any("." in name for name in own)
    return inside if is_averaged and inside else dict(weights)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _agree_on(tensors: dict[str, Tensor], dtype: Any, max_shard_bytes: int) -> None:
    """Raises in every process if one of them can't take part: the others would wait for it."""
    failed: Exception | None = None
    try:
        safetensors()
        _check(tensors, dtype, max_shard_bytes)
    except Exception as error:
        failed = error
    if dist.is_initialized():
        sharded = [name for name, tensor in tensors.items() if is_sharded(tensor)]
        problem = None if failed is None else repr(failed)
        answers: list[Any] = [None] * dist.get_world_size()
        mine = (problem, len(sharded), zlib.crc32(repr(sharded).encode()))
        dist.all_gather_object(answers, mine)
        others = [(rank, answer[0]) for rank, answer in enumerate(answers) if answer[0]]
        if failed is None and others:
            raise RuntimeError(f"process {others[0][0]} can't export: {others[0][1]}")
        if failed is None and len(set(answers)) > 1:
            counts = ", ".join(str(answer[1]) for answer in answers)
            raise RuntimeError(
                f"the processes pass different DTensors ({counts} of them); the same names in the "
                f"same order are expected of all"
            )
    if failed is not None:
        raise failed


def _check(tensors: dict[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; at least 1 is expected")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; a floating-point dtype is expected")
    # Only the first process has the tensors if the state was gathered there.
    if not tensors and _is_first():
        raise ValueError("weights is empty; pass averaged.weights")
    for name, tensor in tensors.items():
        is_plain = type(tensor) is Tensor or isinstance(tensor, nn.Parameter)
        found = None if is_plain or is_sharded(tensor) else type(tensor).__name__
        if found is None and tensor.layout != torch.strided:
            found = f"{tensor.layout} tensor"
        if found is not None:
            raise TypeError(
                f"{name!r} is a {found}; a dense tensor or DTensor is expected. Of FSDP1, pass "
                f"averaged_state_dict(averaged, model, full_state_dict=True)"
            )
        if local(tensor).is_meta:
            raise ValueError(
                f"{name!r} is on the meta device and has no values; give the model its memory, "
                f"and call averaged.copy_from(model)"
            )


def _files(
    tensors: dict[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> dict[str, list[str]]:
    """The names of the tensors in each file, in order; the first process's, in every process."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor, dtype)
        if files[-1] and filled + size > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    told = [dict(zip(names if len(files) > 1 else [_SINGLE], files, strict=True))]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    return told[0]


def _dtype_in_file(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _dtype_in_file(tensor, dtype).itemsize


def _refuse_to_replace(goal: Path) -> None:
    if goal.exists():
        for path in sorted(goal.iterdir()):
            if not _OURS.fullmatch(path.name):
                raise FileExistsError(
                    f"{goal} holds {path.name!r} too, and an export replaces the whole directory; "
                    f"export into one of its own"
                )


def _write(
    path: Path, tensors: dict[str, Tensor], names: list[str], dtype: torch.dtype | None
) -> None:
    """Gathers the tensors of one file, and writes them in the first process."""
    with by_the_first() as is_first:
        values: dict[str, Tensor] = {}
        failed: Exception | None = None
        for name in names:
            if not is_first and not (name in tensors and is_sharded(tensors[name])):
                continue
            whole = _whole(tensors[name])
            # After an error this process goes on gathering, or the others would wait for it.
            if is_first and failed is None:
                try:
                    values[name] = _on_host(whole, tensors[name], dtype)
                except Exception as error:
                    failed = error
                    values.clear()
        if failed is not None:
            raise failed
        if is_first:
            with whole_files.written_whole(path) as beside:
                safetensors().torch.save_file(values, beside, {"format": "pt"})


def _whole(tensor: Any) -> Tensor:
    """The whole tensor; a sharded one is gathered by every process that has a shard."""
    if not is_sharded(tensor):
        return cast(Tensor, tensor)
    if isinstance(tensor, FlatShard):
        return tensor.full_tensor()
    shard, kind = local(tensor), tensor.device_mesh.device_type
    if shard.device.type != kind:
        # An average in host memory: the process group communicates on the model's device.
        tensor = placed_as(tensor, shard.to(kind))
    return cast(Tensor, tensor.full_tensor())


def _on_host(whole: Tensor, original: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy on the CPU that shares no memory: safetensors refuses tensors that share memory."""
    host = whole.to("cpu", _dtype_in_file(whole, dtype)).contiguous()
    memory = local(original).untyped_storage().data_ptr()
    return host.clone() if host.untyped_storage().data_ptr() == memory else host


def _write_index(
    path: Path,
    files: dict[str, list[str]],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
) -> None:
    index = {
        "metadata": {"total_size": sum(_bytes(tensor, dtype) for tensor in tensors.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    with whole_files.written_whole(path) as beside:
        beside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
