"""The average of any width, made from snapshots after training (Karras et al. 2023)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_fused.posthoc.power_profiles import Profile, combine, density, gamma_of
from ema_fused.posthoc.snapshots import Snapshot, read_snapshots
from ema_fused.saving.safetensors_files import safetensors
from ema_fused.saving.whole_files import written_whole

PathLike = str | os.PathLike[str]


def reconstruct(run_dir: PathLike, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of width ``sigma_rel`` at ``step``, from the snapshots in ``run_dir``.

    Args:
        run_dir: the folder that ``PowerFunctionEMA.save_snapshot`` saved into.
        sigma_rel: the width wanted, in (0, 0.2887). The error is smallest between the widths kept.
        step: the step of a snapshot; None: the last.

    Returns:
        A state dict of the model: the averaged tensors, and the other buffers as they were at that
        step. Parameters that ``PowerFunctionEMA`` has left out aren't there:
        ``model.load_state_dict(reconstruct(...), strict=False)`` leaves these as they are.

    Raises:
        ValueError: ``sigma_rel`` is out of range, there is no snapshot of this step, or snapshots
            are damaged or of different runs.
        FileNotFoundError: there are no snapshots.
        ImportError: safetensors is not installed.
    """
    return Reconstruction(run_dir, sigma_rel, step).state_dict()


class Reconstruction:
    """The average of any width from snapshots; their tensors are read only when they are needed.

    Arguments and errors as :func:`reconstruct`.

    Attributes:
        wanted: the profile asked for.
        snapshots: all up to that step; later ones would bring in later weights.
        weights: the weight of each snapshot in the sum.
        error: the L2 distance between the profiles reached and wanted, relative to the norm of the
            latter.
        steps: the number of updates at that step.
        left_out: names of the model's parameters that weren't averaged, and aren't in the result.
    """

    def __init__(self, run_dir: PathLike, sigma_rel: float, step: int | None = None) -> None:
        gamma = gamma_of(sigma_rel)
        snapshots = read_snapshots(Path(run_dir))
        self.steps = snapshots[-1].steps if step is None else step
        self.snapshots = [snapshot for snapshot in snapshots if snapshot.steps <= self.steps]
        if not self.snapshots or self.snapshots[-1].steps != self.steps:
            raise ValueError(
                f"no snapshot of step {step} in {run_dir}; there are {_steps(snapshots)}"
            )
        self._last = self.snapshots[-1]
        self.left_out = list(self._last.left_out)
        self.sigma_rel = sigma_rel
        self.wanted = Profile(gamma, self._last.time)
        self.weights, self.error = combine(
            [snapshot.profile for snapshot in self.snapshots], self.wanted
        )

    @property
    def bytes(self) -> int:
        """The size of the result's tensors, in bytes."""
        return max((_end(entry) for entry in self._last.layout.values()), default=0)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each tensor under one name, in file order; holds one of them in memory at a time.

        Summed in float64, and rounded once to the snapshots' dtype.
        """
        package = safetensors()
        layout = self._last.layout
        with ExitStack() as stack:
            # Files are memory-mapped: open ones take no memory and no file descriptors.
            files = [
                stack.enter_context(package.safe_open(snapshot.path, "pt"))
                for snapshot in self.snapshots
            ]
            for name in sorted(layout, key=lambda name: _end(layout[name])):
                latest = files[-1].get_tensor(name)
                if name in self._last.followers:
                    yield name, latest
                    continue
                wide = torch.promote_types(latest.dtype, torch.float64)
                total = torch.zeros(latest.shape, dtype=wide)
                for file, weight in zip(files, self.weights, strict=True):
                    total.add_(file.get_tensor(name), alpha=weight)
                yield name, total.to(latest.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, tied ones under each of their names."""
        found = dict(self.tensors())
        return found | {name: found[kept] for name, kept in self._last.tied.items()}

    def save(self, path: PathLike, progress: Callable[[int], object] | None = None) -> None:
        """Writes the result to a safetensors file, tensor by tensor.

        Tied tensors are written once; the metadata holds their other names, as
        ``safetensors.torch.save_model`` writes them (``load_model`` reads them).

        Args:
            path: of the file, which is written atomically.
            progress: called after each tensor with the number of bytes written.
        """
        metadata = {
            "format": "pt",
            "sigma_rel": repr(self.sigma_rel),
            "steps": str(self.steps),
            "time": str(self.wanted.time),
            "profile_error": repr(self.error),
            **self._last.tied,
        }
        if self.left_out:
            metadata["left_out"] = json.dumps(self.left_out)
        # The layout of the tensors is that of the snapshots.
        header = json.dumps({"__metadata__": metadata, **self._last.layout}).encode()
        header += b" " * (-len(header) % 8)
        with written_whole(Path(path)) as beside, beside.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for _, tensor in self.tensors():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                if progress is not None:
                    progress(tensor.nbytes)

    def picture(self, path: PathLike) -> None:
        """Draws the profiles wanted and reached over the run, as a PNG at ``path``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"the picture needs matplotlib, which can't be imported ({error}): "
                f"pip install 'ema_fused[posthoc]'"
            ) from error
        end = self.wanted.time
        times = torch.linspace(0, end, 2001, dtype=torch.float64)
        reached = torch.zeros_like(times)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for snapshot, weight in zip(self.snapshots, self.weights, strict=True):
            profile = density(snapshot.profile, times)
            reached += weight * profile
            axes.plot(times.numpy(), (profile * end).numpy(), color="0.85", linewidth=0.8)
        asked = density(self.wanted, times)
        axes.plot(times.numpy(), (asked * end).numpy(), color="C0", linewidth=3, label="asked for")
        axes.plot(times.numpy(), (reached * end).numpy(), "--", color="C1", label="reached")
        axes.set_ylim(
            min(0.0, 1.1 * (reached * end).min().item()), 1.2 * (asked * end).max().item()
        )
        axes.set_xlim(0, end)
        axes.set_xlabel("time (steps or samples)")
        axes.set_ylabel("weight in the average, mean 1")
        axes.set_title(
            f"sigma_rel {self.sigma_rel:g} at step {self.steps} from {len(self.snapshots)} "
            f"snapshots (grey): off by {self.error:.2g}"
        )
        axes.legend(loc="upper left")
        with written_whole(Path(path)) as beside:
            figure.savefig(beside, format="png", dpi=120)


def _end(entry: dict[str, Any]) -> int:
    end: int = entry["data_offsets"][1]
    return end


def _steps(snapshots: list[Snapshot]) -> str:
    steps = sorted({snapshot.steps for snapshot in snapshots})
    if len(steps) > 8:
        return f"{', '.join(map(str, steps[:4]))}, ..., {', '.join(map(str, steps[-3:]))}"
    return ", ".join(map(str, steps))
