"""How long one update by a training framework's hook takes: by ours, and by the original.

    python benchmarks/hook_speed.py [--sets resnet50 1000x1024] [--threads 2] [--json FILE]

The originals are the real classes: those of mmengine and mmcv from the environment; those of mmdet,
MMPretrain and MMSelfSup from where `make` unpacked them, loaded the way the tests load them, by
tests/originals.py. Hooks are called as a runner calls them, with a runner that has only what they
look at.

Each drop-in and its original have networks of their own, with equal values. Before they are timed,
in turns, both go through some updates with new weights before each, and whatever they hold must be
the same bits: otherwise the benchmark stops.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contenders
import shapes
import timing
import torch
import update_speed
from torch import Tensor, nn

SETS = ("resnet50", "1000x1024")
OURS, ORIGINAL = "ema_fused", "original"
_TESTS = Path(__file__).parent.parent / "tests"
_UPDATES_TO_CHECK = 3
_MAX_ITERS = 1_000_000  # more than are run, so that no schedule comes to its end
_PINS = {
    "mmdet 2": "mmdet==2.28.2",
    "mmdet 3": "mmdet==3.3.0",
    "mmpretrain": "mmpretrain==1.2.0",
    "mmselfsup": "mmselfsup==0.11.0",
}


@dataclass(frozen=True)
class Side:
    """A hook at work on a network of its own.

    ``calls`` are one update, in this order; ``trained`` what an optimizer would change; ``state``
    all that hook and network hold, by name.
    """

    runner: Any
    calls: tuple[Callable[[], object], ...]
    trained: list[Tensor]
    state: Callable[[], dict[str, Tensor]]

    def update(self) -> None:
        for call in self.calls:
            call()


@dataclass(frozen=True)
class DropIn:
    """One of our hooks and what it stands in for."""

    name: str
    ours: Side
    original: Side


# ---- The frameworks ------------------------------------------------------------------------------


class Frameworks:
    """The hooks of both sides, imported when this is made."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", "On January 1, 2023, MMCV will release", UserWarning)
        warnings.filterwarnings("ignore", "This overload of add_ is deprecated", UserWarning)
        sys.path.append(str(_TESTS))
        originals = importlib.import_module("originals")
        originals.import_mmcv()

        def unpacked(package: str, module: str) -> Any:
            return originals.original(_PINS[package], module)

        load = importlib.import_module
        self.mmengine = {OURS: load("ema_fused.hooks.mmengine"), ORIGINAL: load("mmengine.hooks")}
        self.averages = load("mmengine.model")
        self.mmdet_average = unpacked("mmdet 3", "mmdet.models.layers.ema").ExpMomentumEMA
        self.mmpretrain_average = unpacked("mmpretrain", "mmpretrain.models.utils.ema").CosineEMA
        self.mmdet = {
            OURS: load("ema_fused.hooks.mmdet"),
            ORIGINAL: unpacked("mmdet 3", "mmdet.engine.hooks.mean_teacher_hook"),
        }
        fused_mmcv = load("ema_fused.hooks.mmcv")
        self.mmcv = {OURS: fused_mmcv, ORIGINAL: load("mmcv.runner.hooks.ema")}
        self.mmdet_2 = {OURS: fused_mmcv, ORIGINAL: unpacked("mmdet 2", "mmdet.core.hook.ema")}
        self.mmselfsup = {
            OURS: load("ema_fused.hooks.mmselfsup"),
            ORIGINAL: unpacked("mmselfsup", "mmselfsup.core.hooks.momentum_update_hook"),
        }
        self.byol = unpacked("mmselfsup", "mmselfsup.models.algorithms.byol").BYOL
        self.byol_parts = unpacked("mmselfsup", "mmselfsup.models.builder").MODELS
        self.wrap_for_mmcv = load("mmcv.parallel").MMDataParallel
        # What a runner tells about itself to averages, which see no runner.
        hub = load("mmengine.logging").MessageHub.get_current_instance()
        hub.update_info("max_iters", _MAX_ITERS)


def _runner(model: nn.Module) -> Any:
    return SimpleNamespace(model=model, iter=0, epoch=0, max_iters=_MAX_ITERS, max_epochs=1)


def _network(values: list[Tensor]) -> nn.Module:
    return contenders.module_of([tensor.clone() for tensor in values])


# ---- The drop-ins --------------------------------------------------------------------------------


def drop_ins(frameworks: Frameworks, values: list[Tensor]) -> Iterator[DropIn]:
    """All of them, on networks of these values; one after another, so that each frees its memory.

    Both sides are given the original's average: our hook puts ours in its place.
    """
    averages = {
        "mmengine EMAHook, ExponentialMovingAverage": frameworks.averages.ExponentialMovingAverage,
        "mmengine EMAHook, StochasticWeightAverage": frameworks.averages.StochasticWeightAverage,
        "mmengine EMAHook, MomentumAnnealingEMA": frameworks.averages.MomentumAnnealingEMA,
        "mmengine EMAHook, mmdet's ExpMomentumEMA": frameworks.mmdet_average,
        "mmengine EMAHook, MMPretrain's CosineEMA": frameworks.mmpretrain_average,
    }

    def both(name: str, side: Callable[..., Side], hooks: dict[str, Any], *rest: Any) -> DropIn:
        return DropIn(name, *(side(hooks[which], values, *rest) for which in (OURS, ORIGINAL)))

    for name, average in averages.items():
        yield both(name, _averaging_side, frameworks.mmengine, average)
    average = frameworks.averages.ExponentialMovingAverage
    yield both("mmengine EMAHook, swap in and out", _swapping_side, frameworks.mmengine, average)
    yield both("mmdet 3 MeanTeacherHook", _teaching_side, frameworks.mmdet)
    yield both("mmcv 1 EMAHook", _registered_side, frameworks.mmcv, "EMAHook")
    for hook in ("ExpMomentumEMAHook", "LinearMomentumEMAHook"):
        yield both(f"mmdet 2 {hook}", _registered_side, frameworks.mmdet_2, hook)
    yield both(
        "MMSelfSup 0 MomentumUpdateHook, BYOL",
        _self_supervised_side,
        frameworks.mmselfsup,
        frameworks,
    )


def _mmengine_hook(hooks: Any, model: nn.Module, average: type) -> tuple[Any, Any]:
    """The hook and its runner, where averaging has begun."""
    runner = _runner(model)
    hook = hooks.EMAHook(ema_type=average)
    hook.before_run(runner)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)  # the first call copies; from here on it averages
    return hook, runner


def _averaging_side(hooks: Any, values: list[Tensor], average: type) -> Side:
    model = _network(values)
    hook, runner = _mmengine_hook(hooks, model, average)
    return Side(
        runner,
        (lambda: hook.after_train_iter(runner, 0),),
        list(model.parameters()),
        lambda: {**hook.ema_model.state_dict(), **model.state_dict()},
    )


def _swapping_side(hooks: Any, values: list[Tensor], average: type) -> Side:
    model = _network(values)
    hook, runner = _mmengine_hook(hooks, model, average)
    return Side(
        runner,
        (lambda: hook.before_val_epoch(runner), lambda: hook.after_val_epoch(runner)),
        list(model.parameters()),
        lambda: {**hook.ema_model.state_dict(), **model.state_dict()},
    )


def _teaching_side(hooks: Any, values: list[Tensor]) -> Side:
    model = nn.Module()
    model.teacher, model.student = _network(values), _network(values)
    runner = _runner(model)
    hook = hooks.MeanTeacherHook()
    hook.before_train(runner)
    return Side(
        runner,
        (lambda: hook.after_train_iter(runner, 0),),
        list(model.student.parameters()),
        model.state_dict,
    )


def _registered_side(hooks: Any, values: list[Tensor], name: str) -> Side:
    """The hooks on mmcv's runners keep their averages in the model."""
    model = _network(values)
    runner = _runner(model)
    hook = getattr(hooks, name)()
    hook.before_run(runner)
    return Side(
        runner,
        (lambda: hook.after_train_iter(runner),),
        list(model.parameters()),
        model.state_dict,
    )


def _self_supervised_side(hooks: Any, values: list[Tensor], frameworks: Frameworks) -> Side:
    """MMSelfSup's own BYOL; its target network gets new storage at each of its own updates."""
    register = frameworks.byol_parts.register_module
    register(name="BenchmarkBackbone", force=True, module=_Backbone)
    register(name="BenchmarkIdentity", force=True, module=nn.Identity)
    model = frameworks.byol(
        backbone={"type": "BenchmarkBackbone", "values": values},
        neck={"type": "BenchmarkIdentity"},
        head={"type": "BenchmarkIdentity"},
    )
    runner = _runner(frameworks.wrap_for_mmcv(model, device_ids=[]))  # the original wants a wrapper
    hook = hooks.MomentumUpdateHook()
    return Side(
        runner,
        (lambda: hook.before_train_iter(runner), lambda: hook.after_train_iter(runner)),
        list(model.online_net.parameters()),
        model.state_dict,
    )


class _Backbone(nn.Module):
    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.network = _network(values)


# ---- Checking and timing -------------------------------------------------------------------------


def check(drop_in: DropIn, seed: int) -> None:
    """Raise unless both sides hold the same bits after each call of some updates."""
    for update in range(_UPDATES_TO_CHECK):
        for side in (drop_in.ours, drop_in.original):
            _train(side, seed + update)
        pairs = zip(drop_in.ours.calls, drop_in.original.calls, strict=True)
        for ours, original in pairs:
            ours()
            original()
            _compare(drop_in, update)


def _train(side: Side, seed: int) -> None:
    side.runner.iter += 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in side.trained:
            tensor.normal_(generator=generator)


def _compare(drop_in: DropIn, update: int) -> None:
    found, wanted = drop_in.ours.state(), drop_in.original.state()
    if found.keys() != wanted.keys():
        raise AssertionError(
            f"{drop_in.name}: not the same names: {sorted(found.keys() ^ wanted.keys())[:6]}"
        )
    for name, tensor in wanted.items():
        if found[name].dtype != tensor.dtype or not torch.equal(_bits(found[name]), _bits(tensor)):
            raise AssertionError(
                f"{drop_in.name}: {name!r} of shape {tuple(tensor.shape)} differs from the "
                f"original's after update {update + 1}"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def measure(
    sets: dict[str, list[shapes.Shape]], rounds: int, sample_seconds: float, seed: int
) -> list[update_speed.Row]:
    """Check and time all drop-ins on these sets of shapes: two rows each, ours first."""
    frameworks = Frameworks()
    rows = []
    for set_name, set_shapes in sets.items():
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator) for shape in set_shapes]
        for drop_in in drop_ins(frameworks, values):
            print(f"measuring {set_name}, {drop_in.name}", file=sys.stderr, flush=True)
            check(drop_in, seed + 1)
            timings = timing.time_in_turns(
                {OURS: drop_in.ours.update, ORIGINAL: drop_in.original.update},
                rounds,
                sample_seconds,
            )
            rows += [
                update_speed.Row(
                    drop_in.name, set_name, which, found.median / timings[OURS].median, found
                )
                for which, found in timings.items()
            ]
    return rows


def environment() -> dict[str, str | int]:
    """The machine, and the versions of the originals too."""
    installed = [f"{name}=={importlib.metadata.version(name)}" for name in ("mmengine", "mmcv")]
    return update_speed.environment() | {"originals": " ".join([*installed, *_PINS.values()])}


def markdown(rows: list[update_speed.Row], about: dict[str, str | int]) -> str:
    """The whole report: a line a drop-in, a column a set of shapes."""
    set_names = list(dict.fromkeys(row.shapes for row in rows))
    cells = {(row.group, row.shapes, row.contender): row for row in rows}
    lines = [", ".join(f"{key} {value}" for key, value in about.items() if key != "command")]
    lines += ["", f"`{about['command']}`", ""]
    lines.append(f"| one update | {' | '.join(set_names)} |")
    lines.append(f"| --- |{' ---: |' * len(set_names)}")
    for name in dict.fromkeys(row.group for row in rows):
        texts = []
        for set_name in set_names:
            ours, original = (cells[name, set_name, which] for which in (OURS, ORIGINAL))
            medians = [_milliseconds(row.timing.median) for row in (ours, original)]
            texts.append(f"**{original.ratio:.2f}** ({', '.join(medians)})")
        lines.append(f"| {name} | {' | '.join(texts)} |")
    lines += ["", "Cells: the original's median time over ours (ours, the original's, in ms)."]
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def options(sets: Sequence[str] = SETS) -> argparse.Namespace:
    """The command line; ``--quick`` overrides what would take long."""
    parser = argparse.ArgumentParser(description="Time ours beside the originals on the CPU.")
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=list(shapes.SHAPE_SETS),
        default=list(sets),
        help="sets of shapes to measure (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=40, help="samples each (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as JSON")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="no side of a shape longer than 4, two rounds: does it run at all?",
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, and write the JSON where it was asked for."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    sets = {name: shapes.SHAPE_SETS[name]() for name in chosen.sets}
    rounds, sample_seconds = chosen.rounds, timing.SAMPLE_SECONDS
    if chosen.quick:
        sets = {f"quick-{name}": shapes.capped(found, 4) for name, found in sets.items()}
        rounds, sample_seconds = 2, 0.0
    rows = measure(sets, rounds, sample_seconds, chosen.seed)
    about = environment()
    print(markdown(rows, about))
    if chosen.json is not None:
        report = {"environment": about, "results": [asdict(row) for row in rows]}
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
