"""Snapshot files of power-function averages: written atomically, and checked when read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ema_fused.modules.choosing import Buffers
from ema_fused.modules.module_pairs import has_average, is_averaged, slots_of
from ema_fused.posthoc.power_profiles import Profile, gamma_of
from ema_fused.saving.safetensors_files import read_header, safetensors
from ema_fused.saving.whole_files import written_whole

_FORMAT = "ema_fused power-function average 1"
_PATTERN = "snapshot-*.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """The header of a snapshot file, which holds one average at one step.

    Attributes:
        run: the name of the run that saved it.
        followers: names of the tensors that are copied, not averaged.
        tied: for each further name of a tied tensor, the name that it is saved under.
        left_out: names of the model's parameters that aren't averaged, and not in the file.
        layout: dtype, shape and offsets in the file of each tensor, as in the safetensors header.
    """

    path: Path
    run: str
    sigma_rel: float
    time: int
    steps: int
    followers: frozenset[str]
    tied: dict[str, str]
    left_out: tuple[str, ...]
    layout: dict[str, dict[str, Any]]

    @property
    def profile(self) -> Profile:
        return Profile(gamma_of(self.sigma_rel), self.time)


def write_snapshot(
    run_dir: Path,
    average: nn.Module,
    *,
    run: str,
    sigma_rel: float,
    time: int,
    steps: int,
    update_buffers: Buffers,
    left_out: Sequence[str],
) -> Path:
    """Saves the tensors of ``average``, each once, and returns the path of the file.

    Args:
        update_buffers: which buffers are averaged too.
        left_out: names of parameters that aren't averaged; they aren't saved.
    """
    names: dict[Tensor, str] = {}
    tied = {}
    for name, tensor in average.state_dict(keep_vars=True).items():
        if name in left_out:
            continue
        if names.setdefault(tensor, name) != name:
            tied[name] = names[tensor]
    averaged = {
        name
        for name, slot in slots_of(average).items()
        if is_averaged(name, slot, update_buffers) and has_average(slot.tensor)
    }
    followers = sorted(name for name in names.values() if name not in averaged)
    metadata = {
        "format": _FORMAT,
        "run": run,
        "sigma_rel": repr(sigma_rel),
        "time": str(time),
        "steps": str(steps),
        "followers": json.dumps(followers),
        "tied": json.dumps(tied),
        "left_out": json.dumps(list(left_out)),
    }
    package = safetensors()
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f"snapshot-{steps:012d}-{sigma_rel!r}.safetensors"
    tensors = {name: tensor.detach().contiguous() for tensor, name in names.items()}
    with written_whole(path) as beside:
        package.torch.save_file(tensors, beside, metadata)
    return path


def _read(path: Path) -> Snapshot:
    package = safetensors()
    try:
        # safe_open checks that the file is complete.
        with package.safe_open(path, "pt"):
            layout = read_header(path)
    except package.SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); remove it to go without it"
        ) from error
    metadata = layout.pop("__metadata__", {})
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} doesn't say that it is a snapshot of PowerFunctionEMA; move it away"
        )
    return Snapshot(
        path=path,
        run=metadata["run"],
        sigma_rel=float(metadata["sigma_rel"]),
        time=int(metadata["time"]),
        steps=int(metadata["steps"]),
        followers=frozenset(json.loads(metadata["followers"])),
        tied=json.loads(metadata["tied"]),
        # Snapshots of earlier versions are of all parameters.
        left_out=tuple(json.loads(metadata.get("left_out", "[]"))),
        layout=layout,
    )


def read_snapshots(run_dir: Path) -> list[Snapshot]:
    """The headers of all snapshots in a folder, in the order of their steps.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged or no snapshot, or they are of different models or runs.
        ImportError: safetensors is not installed.
    """
    snapshots = [_read(path) for path in sorted(run_dir.glob(_PATTERN))]
    if not snapshots:
        raise FileNotFoundError(
            f"no {_PATTERN} in {run_dir}: PowerFunctionEMA.save_snapshot(run_dir) writes them"
        )
    first = snapshots[0]
    for other in snapshots[1:]:
        difference = _difference(first, other)
        if difference is not None:
            raise ValueError(
                f"{first.path.name} and {other.path.name} in {run_dir} are snapshots of different "
                f"{difference}; give each run a folder of its own"
            )
    return sorted(snapshots, key=lambda snapshot: (snapshot.steps, snapshot.sigma_rel))


def _difference(one: Snapshot, other: Snapshot) -> str | None:
    for name in set(one.left_out) ^ set(other.left_out):
        return f"averages: {name!r} is averaged in one of them, and left out of the other"
    for name in (*one.layout, *other.layout):
        if one.layout.get(name) != other.layout.get(name):
            return f"models: {name!r} is {_kind(one, name)} and {_kind(other, name)}"
    if (one.tied, one.followers) != (other.tied, other.followers):
        return "models: the same tensors, but tied or averaged otherwise"
    if one.run != other.run:
        return (
            f"runs, {one.run} and {other.run} (a resumed run that loads the state_dict of its "
            f"PowerFunctionEMA keeps its name)"
        )
    return None


def _kind(snapshot: Snapshot, name: str) -> str:
    found = snapshot.layout.get(name)
    return "not there" if found is None else f"{found['dtype']} {found['shape']}"
