"""Averages checkpoints on disk into a new one, in one pass and in memory of bounded size."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ema_fused.engine.rounding import check_rounding, check_seed
from ema_fused.merging import outputs
from ema_fused.merging.adding_up import INTEGERS, AddingUp, refuse_differing_integers
from ema_fused.merging.choosing import chosen, step_of
from ema_fused.merging.comparing import Common, common
from ema_fused.merging.configurations import ADAPTER_CONFIGS, check_configurations
from ema_fused.merging.hashing import CheckpointHash, check_hash
from ema_fused.merging.outputs import Target
from ema_fused.merging.recognising import Checkpoint, PathLike, open_checkpoint
from ema_fused.merging.resident import resident_bytes
from ema_fused.merging.results import Merged, Result, ResultTensor
from ema_fused.merging.streaming import Part, Stream, part_bytes_in, parts_of, slots_in
from ema_fused.merging.weights import Schedule, check_finite, normalised, weights_of

GIB = 2**30

# Taken beside the buffers: what the interpreter and torch allocate while they work.
_SLACK = 64 * 2**20


@dataclass(frozen=True)
class Input:
    """One of the checkpoints that were merged; ``hash`` is of its tensors."""

    path: str
    weight: float
    hash: str


@dataclass(frozen=True)
class Record:
    """How a checkpoint was made; in the metadata of the files as JSON.

    Attributes:
        schedule: that the weights come from; None: they were given.
        sum: of the weights.
        bytes: of the result's tensors.
        carried_over: files beside the weights that were copied from the last input.
        left_out: names of tensors that were left out, because it was asked for.
    """

    path: str
    schedule: str | None
    inputs: tuple[Input, ...]
    sum: float
    bytes: int
    carried_over: tuple[str, ...]
    left_out: tuple[str, ...]


def merge(
    paths: Sequence[PathLike] | PathLike,
    weights: Sequence[float] | None = None,
    *,
    output: PathLike,
    schedule: Schedule | None = None,
    last: int | None = None,
    every: int | None = None,
    key: str | None = None,
    normalise: bool = True,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    float64: bool = False,
    integers: str = "counters",
    ignore: str | None = None,
    only_common: bool = False,
    adapter_config: str = "equal",
    allow_nonfinite: bool = False,
    memory: int = 2 * GIB,
    format: str | None = None,
    max_shard_bytes: int | None = None,
    hash: str = "crc32",
    steps: Sequence[int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Record:
    """Writes the weighted sum of checkpoints.

    Sums in float32, in float64 where the inputs are; complex numbers alike. Rounds once, at the
    end::

        merge(["run/step-100", "run/step-200"], [0.3, 0.7], output="merged")
        merge("run", output="merged", schedule="minus-sqrt", last=8)

    Args:
        paths: of the checkpoints, from the oldest to the latest, as
            :func:`~ema_fused.merging.recognising.open_checkpoint` takes them; or folders that hold
            checkpoints with numbers in their names. Without ``weights`` and ``steps``, what is in
            the order in which a shell lists names (``step-1000`` before ``step-200``) is taken by
            the numbers, with a warning.
        weights: one per checkpoint. None: by ``schedule``.
        output: the file or folder to write. Complete or absent, even if the program is killed. A
            file is replaced; a folder only if it is an earlier result.
        schedule: as :func:`~ema_fused.merging.weights.weights_of` takes it; None: ``"mean"``.
        last: only so many of the checkpoints, the latest.
        every: only every so many-th, counted back from the latest.
        key: where the weights are in nested dictionaries; None: where the only ones are.
        normalise: divide the weights by their sum.
        dtype: of the floating-point tensors written; None: their own.
        rounding: ``"nearest"``, or ``"stochastic"`` for tensors written in 16 bits.
        seed: of stochastic rounding. Another ``memory`` can divide a tensor otherwise, and then
            draws other bits.
        float64: sum everything in float64.
        integers: ``"last"``: integers and bools are the last checkpoint's. ``"equal"``: they must
            be equal in all. ``"counters"``: those of one element (``num_batches_tracked``) are the
            last's, others must be equal.
        ignore: a regular expression; tensors in whose names it is found are left out.
        only_common: leave out tensors that are not in all checkpoints with one shape and dtype.
        adapter_config: of adapters of PEFT. ``"equal"``: all that changes what their tensors mean
            must be equal in all. ``"last"``: it may differ, and is the last checkpoint's.
        allow_nonfinite: sum inf and NaN too.
        memory: that this program may have resident, in bytes.
        format: ``"safetensors"``, ``"torch"`` or ``"distributed"``; None: as the name of
            ``output`` ends (``.safetensors``; ``.pt``, ``.pth``, ``.ckpt``, ``.bin``), or else as
            the first checkpoint, in a folder.
        max_shard_bytes: largest total size of the tensors in one safetensors file of a folder;
            None: as the first checkpoint's.
        hash: ``"crc32"``, ``"sha256"`` or ``"none"``, of each checkpoint's tensors.
        steps: of the training, one per checkpoint, for the schedule ``power``; None: as contents or
            names tell them.
        progress: called while files are read, with the number of bytes read so far, and of all.

    Returns:
        How it was made: the weights used, and each input's hash. The files hold that too.

    Raises:
        ValueError: the checkpoints or the configurations of adapters differ (with every
            difference), are damaged or can't be read, or hold inf or NaN; integers differ; an
            argument is out of its range; or the memory is too small.
        FileNotFoundError: there is nothing at a path.
        FileExistsError: ``output`` holds something else.
        OSError: the disk is full.
        ImportError: safetensors is not installed.

    If an error is raised, ``output`` is as it was before.
    """
    _check(rounding, integers, adapter_config, hash, dtype, max_shard_bytes)
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    as_given = weights is not None or steps is not None
    places = chosen([Path(path) for path in given], last, every, as_given=as_given)
    goal = Path(output)
    outputs.refuse_overlap(goal, places)
    checkpoints = [open_checkpoint(path, key) for path in places]
    outputs.refuse_overwriting(goal, checkpoints)
    check_configurations(checkpoints, adapter_config)
    used, told = _weights(weights, schedule, checkpoints, steps, normalise=normalise)
    shared = common(checkpoints, ignore=ignore, only_common=only_common)
    target = outputs.target_of(goal, format, checkpoints, max_shard_bytes, dtype)
    tensors = {
        name: ResultTensor(_result_dtype(each[0].dtype, dtype), each[0].shape)
        for name, each in _in_file_order(shared).items()
    }
    outputs.refuse_unwritable(target.format, tensors)
    refuse_differing_integers(checkpoints, shared.tensors, integers)
    _warn(checkpoints, tensors)
    adding_up = AddingUp(
        checkpoints,
        used,
        {name: tensor.dtype for name, tensor in tensors.items()},
        seed=check_seed(seed) if rounding == "stochastic" else None,
        float64=float64,
        allow_nonfinite=allow_nonfinite,
    )
    work = _Work(checkpoints, used, told, shared, target, tensors, hash, memory, progress)
    return work.do(adding_up)


def _check(
    rounding: str,
    integers: str,
    adapter_config: str,
    hash: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int | None,
) -> None:
    check_rounding(rounding)
    check_hash(hash)
    if integers not in INTEGERS:
        raise ValueError(f"integers {integers!r} is none of {', '.join(INTEGERS)}")
    if adapter_config not in ADAPTER_CONFIGS:
        raise ValueError(
            f"adapter_config {adapter_config!r} is none of {', '.join(ADAPTER_CONFIGS)}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; a floating-point dtype is expected")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; at least 1 is expected")


def _weights(
    weights: Sequence[float] | None,
    schedule: Schedule | None,
    checkpoints: Sequence[Checkpoint],
    steps: Sequence[int] | None,
    *,
    normalise: bool,
) -> tuple[list[float], str | None]:
    """The weights to use, and the schedule that they come from."""
    if weights is None:
        schedule = "mean" if schedule is None else schedule
        if steps is None and isinstance(schedule, str) and schedule.startswith("power"):
            steps = _steps_of(checkpoints)
        found = weights_of(schedule, len(checkpoints), steps)
        return found, schedule if isinstance(schedule, str) else getattr(schedule, "__name__", "?")
    if schedule is not None:
        raise ValueError("both weights and a schedule were given; pass one of them")
    found = [float(weight) for weight in weights]
    if len(found) != len(checkpoints):
        raise ValueError(
            f"{len(found)} weights were given for {len(checkpoints)} checkpoints; one each is "
            f"expected"
        )
    check_finite(found)
    return normalised(found) if normalise else found, None


def _steps_of(checkpoints: Sequence[Checkpoint]) -> list[int] | None:
    if all(checkpoint.copied for checkpoint in checkpoints):
        raise ValueError(
            "snapshots of PowerFunctionEMA are averages already; python -m ema_fused reconstruct "
            "makes another width of them"
        )
    steps = [step_of(checkpoint) for checkpoint in checkpoints]
    known = [step for step in steps if step is not None]
    return known if len(known) == len(steps) else None


def _result_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _in_file_order(shared: Common) -> dict[str, Any]:
    """The tensors as they follow each other in the first input's files."""

    def place(name: str) -> tuple[str, int]:
        boxes = shared.tensors[name][0].boxes
        return (str(boxes[0].path), boxes[0].start) if boxes else ("", 0)

    return {name: shared.tensors[name] for name in sorted(shared.tensors, key=place)}


def _warn(checkpoints: Sequence[Checkpoint], names: Mapping[str, object]) -> None:
    real = [checkpoint.path.resolve() for checkpoint in checkpoints]
    twice = sorted({str(path) for path in real if real.count(path) > 1})
    if twice:
        warnings.warn(
            f"given more than once, with as many weights: {', '.join(twice)}", stacklevel=3
        )
    statistics = [name for name in names if name.endswith(("running_mean", "running_var"))]
    if statistics:
        warnings.warn(
            f"{len(statistics)} statistics of batch norm (as {statistics[0]!r}) are averaged too, "
            f"and are not those of the averaged weights; before you evaluate or save the model for "
            f"use, recompute them with torch.optim.swa_utils.update_bn(loader, model)",
            stacklevel=3,
        )


@dataclass
class _Work:
    """All that has been found out before anything is read."""

    checkpoints: Sequence[Checkpoint]
    weights: list[float]
    schedule: str | None
    shared: Common
    target: Target
    tensors: dict[str, ResultTensor]
    hash: str
    memory: int
    progress: Callable[[int, int], object] | None

    def do(self, adding_up: AddingUp) -> Record:
        """Reads, sums and writes."""
        files = self.target.files(self.tensors)
        names = [name for inside in files.values() for name in inside]
        tensors = {name: self.tensors[name] for name in names}
        inputs = len(self.checkpoints)
        room = self.memory - resident_bytes() - _SLACK
        size = part_bytes_in(room, inputs)
        parts = {
            name: parts_of(name, self.shared.tensors[name], size, self._grain(name))
            for name in names
        }
        every = [part for name in names for part in parts[name]]
        self._hashes = [CheckpointHash(self.hash) for _ in self.checkpoints]
        self._finished = not every
        stream = Stream(every, inputs, self._add_to_hash, slots_in(room, every, inputs))
        with stream.running() as read:
            merged = Merged(
                tensors,
                self.shared.tied,
                self._counted(adding_up.results(read), every),
                self.target.place,
                self.target.others,
                self.checkpoints[-1].versions,
                self._metadata(),
                self._json,
            )
            self.target.write(merged, files, parts)
        return self._record()

    def _grain(self, name: str) -> int:
        return self.target.grain(self.tensors[name].shape)

    def _add_to_hash(self, which: int, part: Part, values: memoryview) -> None:
        self._hashes[which].update(part.name, part.tensors[which], values)

    def _counted(self, results: Iterator[Result], parts: Sequence[Part]) -> Iterator[Result]:
        """The results, with the progress told."""
        inputs = len(self.checkpoints)
        total = inputs * sum(part.bytes for part in parts)
        done = 0
        for part, result in zip(parts, results, strict=True):
            done += part.bytes * inputs
            self._finished = done == total
            if self.progress is not None:
                self.progress(done, total)
            yield result

    def _metadata(self) -> dict[str, str]:
        """That of the last input, unless it says what is no longer so."""
        last = self.checkpoints[-1]
        if last.copied:
            return {}
        ties = last.contents.tied
        return {name: text for name, text in last.contents.metadata.items() if name not in ties}

    def _record(self) -> Record:
        none = "0" * len(CheckpointHash(self.hash).hexdigest())
        inputs = tuple(
            Input(str(checkpoint.path), weight, hash.hexdigest() if self._finished else none)
            for checkpoint, weight, hash in zip(
                self.checkpoints, self.weights, self._hashes, strict=True
            )
        )
        return Record(
            str(self.target.goal),
            self.schedule,
            inputs,
            math.fsum(self.weights),
            sum(tensor.bytes for tensor in self.tensors.values()),
            tuple(self.target.beside),
            tuple(self.shared.left_out),
        )

    def _json(self) -> str:
        # Not by an import: averages read states by this folder, and the package imports averages.
        version = sys.modules["ema_fused"].__version__

        told = {"made_by": f"ema_fused {version} merge", "hash": self.hash}
        return json.dumps({**told, **asdict(self._record())})
