"""What the processes of test_killed_saves.py run: they save, and some are killed while they do.

As a program (``killed_saves_run.py FOLDER``) it sweeps over the moments at which a process that
saves may be killed, each in a fork of its own, and prints what is found afterwards as JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ema_fused import AveragedWeights
from ema_fused.saving.checkpoints import averaged_state_dict, load, load_averaged_state_dict, save
from tests.processes import die
from tests.sharded_models import perceptron, spread, train, trainer, whole


class Death(NamedTuple):
    """The process of ``rank`` is killed while it saves after ``step``.

    Just before its ``count``-th ``event`` (an audit event of Python) on the checkpoint's files.
    """

    rank: int
    step: int
    event: str
    count: int


def die_at(death: Death, folder: Path) -> None:
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == death.event and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == death.count:
                die()

    sys.addaudithook(look)


# Training with two ranks.


class Training:
    """A sharded model, its optimizer and its average; saved together."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = trainer(model)
        self.averaged = AveragedWeights(model, 0.1, averaged_dtype=torch.float64)

    def step(self, number: int) -> None:
        train(self.model, self.optimizer, number, "fsdp2")
        for buffer in self.model.buffers():
            # Each process has seen other samples, and a checkpoint holds a buffer once.
            dist.broadcast(buffer, 0)
        self.averaged.update_parameters(self.model)

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        averaged = averaged_state_dict(self.averaged, self.model)
        return {"model": model, "optimizer": optimizer, "averaged": averaged}

    def resume(self, path: Path) -> int:
        """The steps made so far."""
        state = self.state()
        load(state, path)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        load_averaged_state_dict(self.averaged, self.model, state["averaged"])
        return int(self.averaged.steps)


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """The whole tensors and numbers of a nested state, by their paths."""
    if isinstance(state, dict):
        items = [flat(value, f"{prefix}/{key}") for key, value in state.items()]
        return {name: value for item in items for name, value in item.items()}
    if isinstance(state, Tensor):
        return {prefix: whole(state)}
    return {prefix: state}


def train_and_save(
    folder: Path, steps: int, death: Death | None = None, resumes: bool = False
) -> list[dict[str, Any]]:
    """Trains and saves at every step; the whole states after each step made here."""
    training = Training(spread(perceptron(), "fsdp2"))
    done = training.resume(folder / "checkpoint") if resumes else 0
    states = []
    for step in range(done + 1, steps + 1):
        training.step(step)
        if death is not None and (death.rank, death.step) == (dist.get_rank(), step):
            die_at(death, folder)
        save(training.state(), folder / "checkpoint")
        states.append(flat(training.state()))
    return states


# Other numbers of processes.


def sharded_over(ranks: list[int], seed: int) -> tuple[nn.Module, DeviceMesh]:
    model, mesh = perceptron(seed), DeviceMesh("cpu", ranks)
    if dist.get_rank() in ranks:
        for layer in (model.first, model.last, model):
            fully_shard(layer, mesh=mesh)
    return model, mesh


def filled(model: nn.Module) -> AveragedWeights:
    """An average with values that differ everywhere, of any model of this structure."""
    averaged = AveragedWeights(model, 0.25, averaged_dtype=torch.float64)
    model.load_state_dict(spread_as(model, perceptron(7).state_dict()))
    averaged.update_parameters(model)
    model.load_state_dict(spread_as(model, perceptron(8).state_dict()))
    averaged.update_parameters(model)
    return averaged


def spread_as(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = model.state_dict()
    return {
        name: distribute_tensor(tensor, own[name].device_mesh, own[name].placements)
        if isinstance(own[name], DTensor)
        else tensor
        for name, tensor in state.items()
    }


def save_average(path: Path, ranks: list[int]) -> dict[str, Tensor]:
    """Saved by ``ranks`` of all processes; whole, as they have it."""
    model, mesh = sharded_over(ranks, seed=1)
    if dist.get_rank() not in ranks:
        return {}
    averaged = filled(model)
    save(averaged_state_dict(averaged, model), path, process_group=mesh.get_group())
    options = StateDictOptions(full_state_dict=True)
    found = get_model_state_dict(averaged.module, options=options)
    return {name: tensor.clone() for name, tensor in found.items()}


def load_average(path: Path, ranks: list[int]) -> dict[str, Tensor]:
    """The same, loaded by others into an average of another model."""
    model, mesh = sharded_over(ranks, seed=2)
    if dist.get_rank() not in ranks:
        return {}
    averaged = AveragedWeights(model, 0.25, averaged_dtype=torch.float64)
    state = averaged_state_dict(averaged, model)
    load(state, path, process_group=mesh.get_group())
    load_averaged_state_dict(averaged, model, state)
    assert int(averaged.steps) == 2
    options = StateDictOptions(full_state_dict=True)
    found = get_model_state_dict(averaged.module, options=options)
    return {name: tensor.clone() for name, tensor in found.items()}


# The sweep in one process.


def tensors(version: float) -> dict[str, Any]:
    return {
        "a": torch.full((1000,), version),
        "nested": {"b": torch.full((3, 5), version), "c": torch.full((), version)},
    }


def version_at(path: Path) -> float:
    """The one that all tensors are of; fails on a mixture."""
    found = tensors(math.nan)
    load(found, path)
    values = {float(x) for tensor in flat(found).values() for x in tensor.flatten()}
    if len(values) != 1:
        raise AssertionError(f"a mixture of {sorted(values)}")
    return values.pop()


def save_and_die(path: Path, version: float, actions: int) -> bool:
    """Whether a process of its own could save; it is killed before its n-th action on files."""
    child = os.fork()
    if child == 0:
        left = actions

        def act(event: str = "fsync", _: Any = None) -> None:
            nonlocal left
            if event == "fsync" or event == "open" or event.startswith(("os.", "shutil.")):
                left -= 1
                if left == 0:
                    die()

        fsync = os.fsync
        os.fsync = lambda file: (act(), fsync(file))[1]
        sys.addaudithook(act)
        try:
            save(tensors(version), path)
        except BaseException:
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "the save failed"
    return True


class Kill(NamedTuple):
    """A save of ``wrote`` over ``before``: what was loaded ``after`` it, and whether it was done.

    ``files``: the names in the checkpoint's folder afterwards, its own included.
    """

    before: float
    wrote: float
    after: float
    done: bool
    files: list[str]


def kill(path: Path, version: float, actions: int) -> Kill:
    before = version_at(path)
    done = save_and_die(path, version, actions)
    files = sorted(file.name for file in path.parent.iterdir())
    return Kill(before, version, version_at(path), done, files)


def sweep(folder: Path) -> tuple[list[Kill], list[Kill]]:
    """Kills saves at the first action on files, at the second, ..., until one is complete.

    First each save replaces a whole checkpoint. Then each replaces what the previous kill has
    left, killed at a later action each time, and afterwards at an earlier one each time.
    """
    anew: list[Kill] = []
    while not anew or not anew[-1].done:
        path = folder / str(len(anew)) / "checkpoint"
        save(tensors(1.0), path)
        anew.append(kill(path, 2.0, len(anew) + 1))
    path = folder / "in-a-row" / "checkpoint"
    save(tensors(0.0), path)
    moments = range(1, len(anew) + 6)  # deleting what was left takes some more
    in_a_row = [
        kill(path, float(version), actions)
        for version, actions in enumerate([*moments, *reversed(moments), 1000], 1)
    ]
    return anew, in_a_row


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    print(json.dumps(sweep(Path(sys.argv[1]))))
