"""Short trainings in mmcv's own runners, with the original averaging hooks and with ours.

As a script it trains in a process of its own: ``python mmcv_runs.py jobs.json``, a list of the
arguments of :func:`do`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.frameworks.originals import import_mmcv, original
from tests.networks import ConvNet, differences, snapshot
from tests.processes import finish_group, start
from tests.threads import on_threads

import_mmcv()
mmcv_runner = importlib.import_module("mmcv.runner")
mmcv_parallel = importlib.import_module("mmcv.parallel")
_mmdet = original("mmdet==2.28.2", "mmdet.core.hook.ema")

THEIRS = types.SimpleNamespace(
    EMAHook=mmcv_runner.EMAHook,
    BaseEMAHook=_mmdet.BaseEMAHook,
    ExpMomentumEMAHook=_mmdet.ExpMomentumEMAHook,
    LinearMomentumEMAHook=_mmdet.LinearMomentumEMAHook,
)
OURS = importlib.import_module("ema_fused.hooks.mmcv")
SIDES: dict[str, Any] = {"ours": OURS, "theirs": THEIRS}

BATCHES = 8  # of an epoch

# Both runners sleep at the end of each epoch, 2 seconds, for the sake of worker processes.
_awake = types.SimpleNamespace(sleep=lambda seconds: None)
for _module in ("epoch_based_runner", "iter_based_runner"):
    importlib.import_module(f"mmcv.runner.{_module}").time = _awake


class Net(ConvNet):
    """What the runners train."""

    def train_step(self, data: dict[str, Tensor], optimizer: object = None) -> dict[str, Any]:
        dtype = self.head.weight.dtype
        outputs = self(data["images"].to(dtype))
        loss = (outputs - data["targets"].to(dtype)).square().mean()
        return {"loss": loss, "log_vars": {"loss": loss.item()}, "num_samples": len(outputs)}

    val_step = train_step


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def samples(rank: int = 0) -> Any:
    """An epoch of batches, in the same order in every epoch."""
    random = torch.Generator().manual_seed(100 + rank)
    count = 4 * BATCHES
    images = torch.randn(count, 1, 6, 6, generator=random)
    targets = torch.randn(count, 31, generator=random)
    pairs = [{"images": i, "targets": t} for i, t in zip(images, targets, strict=True)]
    return DataLoader(pairs, batch_size=4)  # type: ignore[arg-type]


class CPUIterBasedRunner(mmcv_runner.IterBasedRunner):  # type: ignore[misc, name-defined]
    """The original asks for the current GPU when it resumes."""

    def resume(self, checkpoint: str, resume_optimizer: bool = True) -> None:
        super().resume(checkpoint, resume_optimizer, map_location="cpu")


class Moment(NamedTuple):
    """All tensors of the model at one point of a training, and the loss there."""

    stage: str
    iteration: int
    tensors: dict[str, Tensor]


class Recorder(mmcv_runner.Hook):  # type: ignore[misc, name-defined]
    """Comes last at each stage, and takes down what it finds."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def _record(self, stage: str, runner: Any) -> None:
        model = runner.model
        tensors = snapshot(model.module if mmcv_parallel.is_module_wrapper(model) else model)
        loss = torch.tensor(runner.outputs["log_vars"]["loss"], dtype=torch.float64)
        self.moments.append(Moment(stage, runner.iter, {**tensors, "loss": loss}))

    def after_train_iter(self, runner: Any) -> None:
        self._record("trained", runner)

    def after_train_epoch(self, runner: Any) -> None:
        self._record("epoch ended", runner)

    def after_val_iter(self, runner: Any) -> None:
        self._record("evaluated", runner)


class Call(mmcv_runner.Hook):  # type: ignore[misc, name-defined]
    """Calls ``function(runner)`` before one iteration."""

    def __init__(self, function: Callable[[Any], object], *, at: int) -> None:
        self._function, self._at = function, at

    def before_train_iter(self, runner: Any) -> None:
        if runner.iter == self._at:
            self._function(runner)


class Run(NamedTuple):
    runner: Any
    model: nn.Module
    moments: list[Moment]

    @property
    def end(self) -> dict[str, Tensor]:
        return snapshot(self.model)

    def of(self, stage: str) -> list[dict[str, Tensor]]:
        return [moment.tensors for moment in self.moments if moment.stage == stage]


@on_threads(1)  # several only wait for one another with tensors this small
def run(
    *hooks: Any,
    model: nn.Module | None = None,
    kind: str = "epoch",
    epochs: int = 3,
    evaluate: bool = True,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    work_dir: Path | str | None = None,
    batches: Any = None,
    momentum: float = 0.9,
) -> Run:
    """Trains ``model`` with these hooks; with a ``work_dir``, saves it after each epoch.

    Args:
        kind: of runner: by epochs, or by iterations (as many).
        wrap: what the model is wrapped in.
        momentum: of the optimizer.
    """
    model = net() if model is None else model
    wrapped = model if wrap is None else wrap(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_epoch = kind == "epoch"
    runner = {"epoch": mmcv_runner.EpochBasedRunner, "iter": CPUIterBasedRunner}[kind](
        wrapped,
        optimizer=torch.optim.SGD(trainable, lr=0.05, momentum=momentum),
        work_dir=None if work_dir is None else str(work_dir),
        logger=logging.getLogger("mmcv_runs"),
        meta={},
        **({"max_epochs": epochs} if by_epoch else {"max_iters": epochs * BATCHES}),
    )
    runner.register_optimizer_hook({"grad_clip": None})
    for hook in hooks:
        # As mmdet's configs do: an averaging hook acts before checkpoints are written.
        runner.register_hook(hook, priority=49)
    if work_dir is not None:
        interval = 1 if by_epoch else BATCHES
        runner.register_checkpoint_hook({"interval": interval, "by_epoch": by_epoch})
    recorder = Recorder()
    runner.register_hook(recorder, priority="LOWEST")
    batches = samples() if batches is None else batches
    each = 1 if by_epoch else BATCHES
    workflow = [("train", each), ("val", each)] if evaluate else [("train", each)]
    runner.run([batches] * len(workflow), workflow)
    return Run(runner, model, recorder.moments)


def run_both(name: str, arguments: dict[str, Any], **training: Any) -> tuple[Run, Run]:
    """(our run, the original's): the same but for the hook; ``model`` and ``wrap`` make new ones.

    ``work_dir`` is the folder of two.
    """
    runs = []
    for side, hooks in SIDES.items():
        own = dict(training)
        if "model" in own:
            own["model"] = own["model"]()
        if "work_dir" in own:
            own["work_dir"] = Path(own["work_dir"]) / side
        runs.append(run(getattr(hooks, name)(**arguments), **own))
    return runs[0], runs[1]


def assert_same(ours: Run, theirs: Run, *, stale_integers: bool = False) -> None:
    """Both trainings were the same to the bit, at every iteration, in every tensor.

    With ``stale_integers`` but for what is different on purpose: the integers in averages, and in
    the model while it holds its averages.
    """
    assert len(ours.moments) == len(theirs.moments) > 0
    for our, their in zip(ours.moments, theirs.moments, strict=True):
        assert our[:2] == their[:2]
        assert list(our.tensors) == list(their.tensors)
        left_out = set()
        if stale_integers:
            left_out = {
                name
                for name, tensor in our.tensors.items()
                if not tensor.is_floating_point()
                and (our.stage != "trained" or name.startswith("ema_"))
            }
        differ = set(differences(our.tensors, their.tensors)) - left_out
        assert not differ, f"{sorted(differ)} differ: {our.stage}, iteration {our.iteration}"


def assert_same_checkpoints(ours: Path, theirs: Path, *, stale_integers: bool = False) -> None:
    """Two checkpoint files hold the same tensors, in the same order."""
    our, their = torch.load(ours), torch.load(theirs)
    assert [our["meta"][key] for key in ("epoch", "iter")] == [
        their["meta"][key] for key in ("epoch", "iter")
    ]
    assert list(our["state_dict"]) == list(their["state_dict"])
    integers = {name for name in our["state_dict"] if name.endswith("num_batches_tracked")}
    differ = set(differences(our["state_dict"], their["state_dict"]))
    assert not differ - (integers if stale_integers else set())
    our_state, their_state = our["optimizer"]["state"], their["optimizer"]["state"]
    assert our_state.keys() == their_state.keys() != set()
    for key in our_state:
        assert not differences(our_state[key], their_state[key])


# In processes of their own.


def do(side: str, name: str, arguments: dict[str, Any], save: str, **training: Any) -> None:
    """One training; what it went through is saved. ``training`` as in :func:`run`."""
    if training.pop("distributed", False):
        training["wrap"] = mmcv_parallel.MMDistributedDataParallel
        training["batches"] = samples(torch.distributed.get_rank())
        save += str(torch.distributed.get_rank())
    done = run(getattr(SIDES[side], name)(**arguments), **training)
    torch.save([tuple(moment) for moment in done.moments], save)


def load(save: Path | str) -> Run:
    """The moments of a run that was saved."""
    return Run(None, nn.Module(), [Moment(*moment) for moment in torch.load(save)])


def in_new_processes(jobs: list[dict[str, Any]], folder: Path, *, processes: int = 1) -> None:
    """Does the jobs in each of ``processes`` new processes; several are a distributed group."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    environments = (
        [{"RANK": str(rank), "WORLD_SIZE": str(processes)} for rank in range(processes)]
        if processes > 1
        else [{}]
    )
    finish_group([start(__file__, file, OMP_NUM_THREADS="1", **more) for more in environments])


def main() -> None:
    file = Path(sys.argv[1])
    if "RANK" in os.environ:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{file.with_suffix('.meeting')}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    for job in json.loads(file.read_text(encoding="utf-8")):
        do(**job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
