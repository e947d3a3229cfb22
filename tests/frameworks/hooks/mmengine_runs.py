"""Training in mmengine's own Runner, on the CPU: for tests that hold a hook beside its original.

Two runs with equal arguments do the same to the bit, whatever else ran in the process before; so
whatever differs between them is the hook's doing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import mmengine.device.utils
import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.networks import bits, snapshot
from tests.threads import on_threads

BATCHES = 5  # in an epoch
_BATCH_SIZE = 8
_CLASSES = 3
_numbers = itertools.count()
# Where there is a GPU as well, runners would take it, and not repeat themselves to the bit.
mmengine.device.utils.DEVICE = "cpu"


class Images(Dataset[Any]):
    """Noise, and a class for each: the same every time."""

    def __init__(self, length: int = BATCHES * _BATCH_SIZE) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(length, 1, 8, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % _CLASSES


class Net(BaseModel):  # type: ignore[misc]
    """Convolution, batch norm and a head: vectors, float buffers and an integer one.

    Its weights are drawn anew by ``init_weights``, which a runner calls after ``before_run``.
    """

    def __init__(self) -> None:
        super().__init__(init_cfg={"type": "Normal", "layer": ["Conv2d", "Linear"], "std": 0.3})
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, _CLASSES)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """``mode`` is mmengine's: "loss" in training, "predict" in evaluation."""
        images = images.to(self.conv.weight.dtype)
        logits = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(logits, labels)}
        return list(logits)


class Logits(BaseMetric):  # type: ignore[misc]
    """Numbers that change with any weight of the model."""

    default_prefix = "logits"

    def process(self, data_batch: Any, data_samples: Sequence[Tensor]) -> None:
        self.results += [sample.double() for sample in data_samples]

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        logits = torch.stack(results)
        return {"sum": logits.sum().item(), "squares": logits.square().sum().item()}


class _Metrics(Hook):  # type: ignore[misc]
    """Notes the metrics of each evaluation."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.noted: list[dict[str, float]] = []

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.noted.append(dict(metrics or {}))

    after_test_epoch = after_val_epoch


class _Messages(logging.Handler):
    """Keeps warnings and worse that mmengine's logger is given."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


@dataclass
class Run:
    """A runner, and what to compare of it.

    Attributes:
        metrics: of each evaluation so far.
        messages: warnings and errors that mmengine's logger was given.
    """

    runner: Runner
    folder: Path
    metrics: list[dict[str, float]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def hook(self, kind: type = EMAHook) -> Any:
        """The hook of this class (the original's or ours, which derives from it)."""
        (found,) = (hook for hook in self.runner.hooks if isinstance(hook, kind))
        return found

    @property
    def model(self) -> Any:
        """The model without its wrapper."""
        model = self.runner.model
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def train(self) -> Run:
        """Runs, and gives itself."""
        return self._run(self.runner.train)

    def go_on(self) -> Run:
        """Trains on where the training has raised."""
        return self._run(self.runner.train_loop.run)

    def val(self) -> Run:
        return self._run(self.runner.val)

    def test(self) -> Run:
        return self._run(self.runner.test)

    def _run(self, loop: Callable[[], object]) -> Run:
        # Tensors this small take many times as long on two busy cores. And mmengine's checkpoints
        # aren't weights only, and it loads them as torch does.
        with on_threads(1), mock.patch.dict(os.environ, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"):
            loop()
        return self

    def checkpoint(self, name: str) -> Any:
        """What is in a file of the run."""
        return load(self.folder / name)

    def everything(self) -> dict[str, Any]:
        """All that this run has come to: tensors, metrics and every checkpoint file."""
        found: dict[str, Any] = {"model": snapshot(self.model), "metrics": list(self.metrics)}
        for hook in self.runner.hooks:
            if hasattr(hook, "ema_model"):
                found["average"] = snapshot(hook.ema_model)
        for file in sorted(self.folder.glob("*.pth")):
            found[file.name] = comparable(load(file))
        return found


def build(
    hook: Any,
    folder: Path,
    *,
    model: Callable[[], nn.Module] = Net,
    epochs: int = 3,
    iters: int | None = None,
    val_interval: int = 1,
    save_interval: int = 1,
    load_from: Path | None = None,
    resume: bool = False,
    hooks: Sequence[Any] = (),
    dataset: Callable[[], Dataset[Any]] = Images,
    metric: Callable[[], BaseMetric] = Logits,
    learning_rate: float = 0.1,
    seed: int = 3,
    log_level: str = "ERROR",
    cfg: dict[str, Any] | None = None,
    **arguments: Any,
) -> Run:
    """A runner that has not run yet.

    Args:
        hook: a hook or its configuration; None for none.
        folder: for checkpoints and logs.
        model: makes the model, after torch was seeded.
        epochs: how long to train, where ``iters`` isn't given.
        iters: iterations to train, in mmengine's IterBasedTrainLoop; intervals are in iterations
            then.
        val_interval: from one validation to the next; with 0 there is none.
        save_interval: from one checkpoint to the next.
        load_from: a checkpoint.
        resume: whether to go on from it, or else from the last one in ``folder``.
        hooks: further hooks, or their configurations.
        dataset: makes the data, of both training and validation.
        metric: makes the metric.
        learning_rate: of SGD with momentum.
        seed: of the model's values and of the order of the data.
        log_level: from which on messages are in the log's file.
        cfg: the runner's ``cfg``, for what has no argument of its own.
        **arguments: further arguments of the runner.
    """
    by_epoch = iters is None

    def loader(shuffle: bool) -> dict[str, Any]:
        # The iteration-based loop waits for two seconds whenever a finite sampler is at its end.
        kind = "InfiniteSampler" if shuffle and not by_epoch else "DefaultSampler"
        return {
            "dataset": dataset(),
            "batch_size": _BATCH_SIZE,
            "num_workers": 0,
            "sampler": {"type": kind, "shuffle": shuffle},
            "collate_fn": {"type": "default_collate"},
        }

    metrics = _Metrics()
    length = {"by_epoch": True, "max_epochs": epochs}
    if not by_epoch:
        length = {"by_epoch": False, "max_iters": iters}
    validation = {
        "val_dataloader": loader(shuffle=False),
        "val_evaluator": [metric()],
        "val_cfg": {},
    }
    torch.manual_seed(seed)
    runner = Runner(
        model=model(),
        work_dir=str(folder),
        train_dataloader=loader(shuffle=True),
        train_cfg={**length, "val_interval": val_interval or 1},
        **(validation if val_interval else {}),
        test_dataloader=loader(shuffle=False),
        test_evaluator=[metric()],
        test_cfg={},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": learning_rate, "momentum": 0.9}},
        custom_hooks=[*([] if hook is None else [hook]), *hooks, metrics],
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": 100_000},
            "checkpoint": {
                "type": "CheckpointHook",
                "interval": save_interval,
                "by_epoch": by_epoch,
            },
        },
        load_from=None if load_from is None else str(load_from),
        resume=resume,
        randomness={"seed": seed},
        log_level=log_level,
        # Loggers and message hubs are found by this name, for as long as the process lives.
        experiment_name=f"run_{os.getpid()}_{next(_numbers)}",
        cfg=cfg,
        **arguments,
    )
    messages = _Messages()
    runner.logger.addHandler(messages)
    return Run(runner, folder, metrics.noted, messages.kept)


def trained(hook: Any, folder: Path, **arguments: Any) -> Run:
    """A runner after its training; arguments as :func:`build`."""
    return build(hook, folder, **arguments).train()


def side_by_side(theirs: Any, ours: Any, folder: Path, **arguments: Any) -> tuple[Run, Run]:
    """Two trainings that differ in the hook alone; arguments as :func:`build`.

    In them, hooks are configurations (``{"type": SomeHook}``), of which each run makes its own.
    """
    return (
        trained(theirs, folder / "theirs", **arguments),
        trained(ours, folder / "ours", **arguments),
    )


class PowerCutError(Exception):
    """Raised by nobody else."""


class Breaks(Hook):  # type: ignore[misc]
    """Ends a run before an iteration, counted from 0."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.at:
            raise PowerCutError


def broken_off(hook: Any, folder: Path, at: int, **arguments: Any) -> Run:
    """A training that ended before iteration ``at``; arguments as :func:`build`."""
    run = build(hook, folder, hooks=[{"type": Breaks, "at": at}], **arguments)
    with contextlib.suppress(PowerCutError):
        run.train()
        raise AssertionError(f"the run has no iteration {at}")
    return run


def load(file: Path) -> Any:
    """A checkpoint. It holds message hubs and the like, so it can't be loaded as weights only."""
    return torch.load(file, map_location="cpu", weights_only=False)


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without what differs from run to run: times and names."""
    found = dict(checkpoint)
    meta, hub = found.pop("meta"), found.pop("message_hub")
    found["meta"] = {name: meta[name] for name in ("epoch", "iter", "seed")}
    found["scalars"] = {
        name: scalar for name, scalar in hub["log_scalars"].items() if "time" not in name
    }
    return found


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nests of dicts and lists are not the same: tensors to the bit, keys in order."""
    if type(one) is not type(other) and not (isinstance(one, dict) and isinstance(other, dict)):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{path}: keys {list(one)} and {list(other)}"]
        return [line for key in one for line in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} items"]
        pairs = enumerate(zip(one, other, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}/{i}")]
    if isinstance(one, HistoryBuffer):
        return differences(list(one.data), list(other.data), path)
    return [] if _is_same(one, other) else [path]


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(bits(one), bits(other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    # A NaN has many bit patterns, and is unequal to itself.
    return bool(one == other) or (one != one and other != other)


def assert_same_rest(rest: Path, whole: Path) -> None:
    """The last two of four epochs are the same, in a run that was resumed and in a whole one."""
    for name in ("epoch_3.pth", "epoch_4.pth"):
        found, expected = (comparable(load(folder / name)) for folder in (rest, whole))
        # The validation between the checkpoint and the interruption is in none of its files.
        del found["scalars"], expected["scalars"]
        assert differences(found, expected) == []
