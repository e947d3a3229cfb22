"""How fast an averaged update is, beside every other way to do it, on this machine.

    python -m benchmarks [--device cpu] [--models resnet50 ...] [--peers mmengine ...]
        [--dtypes float32 ...] [--json FILE] [--pictures FOLDER]

Prints tables of ratios: a contender's median time over ours, both from this one run, in which they
took turns, with times beside them for orientation only. Caches are cold first, then warm. Before
anything is timed, each contender's result is compared with torch's or the original's. Exit status
77: there is no GPU; 1: a case failed (the others are written all the same). What isn't installed or
doesn't fit the memory is left out, and said. ``--rehearse`` runs what a GPU is measured by on the
CPU, with tiny tensors, and marks what it writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import NO_GPU, apex, compiled, peers, records, sharded, step, targets
from ema_fused.bench.cases import BUSY_LISTS, busy_cases, host_cases, torch_cases
from ema_fused.bench.contenders import DTYPES
from ema_fused.bench.environment import Environment, environment, output_of, why_no_gpu
from ema_fused.bench.measuring import Case, Report, Run
from ema_fused.bench.progress import tracked
from ema_fused.bench.shapes import Shapes, find, networks
from ema_fused.bench.tables import Table, about, markdown, show, tables
from ema_fused.bench.timing import NO_EFFORT, Clock, Effort, clock_of

growth: ModuleType | None
try:
    from benchmarks import growth
except ImportError:  # scipy, which a GPU's image may not have
    growth = None

_LISTS = ("1000x1024", "1000x16")
# In a smoke run: these, with no side longer than that, and so many elements and tensors.
_SMOKE_MODELS, _LONGEST = ("resnet50", "20x16"), 4
_FEW_TENSORS, _FEW_ELEMENTS = (10, 100), (10**3, 10**4, 10**5)
# On a GPU a list has to be far larger than its cache before it shows the memory's speed.
_GPU_MODELS = (
    "16x16777216",
    "resnet50",
    "128x16777216",
    "vit_l_16",
    "llama_3_8b*24",
    "sdxl_unet",
)
_REHEARSED = 2  # so many of them in a rehearsal
_HOST_LISTS, _SMOKE_HOST_LISTS = ("161x16", "1000x16", "5000x16"), ("161x16", "20x16")
_TORCH, _GROWTH = "torch", "growth"
_COMPILED, _SHARDED, _STEP, _BUSY, _APEX = "compiled", "sharded", "step", "busy", "apex"
_PEERS = (_TORCH, _GROWTH, _COMPILED, _SHARDED, _STEP, _BUSY, *peers.NAMES)
_GPU_PEERS = (_TORCH, _COMPILED, _SHARDED, _APEX)
_CPU_ALONE, _GPU_ALONE = (_STEP, _BUSY), (_APEX,)
# What these measure where no models are named.
_LISTS_OF = {_COMPILED: compiled.MODELS, _SHARDED: sharded.MODELS, _BUSY: BUSY_LISTS}
_GPU_LISTS_OF = {_COMPILED: compiled.ON_GPU, _SHARDED: sharded.ON_GPU, _APEX: apex.MODELS}
_SMOKE_LISTS = ("20x16",)
_REHEARSAL = "**A rehearsal: tiny tensors on the CPU. These numbers say nothing of a GPU.**"


def run_of(chosen: argparse.Namespace, clock: Clock) -> Run:
    """The run that was chosen, in which nothing is measured yet."""
    effort = NO_EFFORT if chosen.smoke else Effort(case_seconds=chosen.case_seconds)
    run = Run(clock, effort, environment(clock.device) | _commit(), chosen.seconds)
    run.report |= {"smoke": chosen.smoke, "rehearsal": chosen.rehearse}
    return run


def measure(run: Run, chosen: argparse.Namespace) -> Iterator[None]:
    """Measure everything; after each case the report is worth writing."""
    cases = list(_cases(chosen, run.clock, run))
    for _ in run.measure(tracked(cases)):
        yield


def _cases(chosen: argparse.Namespace, clock: Clock, run: Run) -> Iterator[Case]:
    """The main things first, should time run out."""
    models = [_shapes(key, chosen.smoke) for key in chosen.models]
    if _TORCH in chosen.peers:
        if clock.device.type == "cuda" or chosen.smoke:
            keys = _SMOKE_HOST_LISTS if chosen.smoke else _HOST_LISTS
            yield from host_cases([find(key) for key in keys], clock)
        for shapes in models:
            yield from torch_cases(shapes, chosen.dtypes, clock)
    others = [peer for peer in chosen.peers if peer != _TORCH]
    if others and "float32" not in chosen.dtypes:
        run.leave_out(", ".join(others), "measured in float32 only, which was not chosen")
        others = []
    for peer in (peer for peer in others if peer in peers.NAMES):
        try:
            yield from peers.peer_cases(peer, models, clock)
        except (ImportError, OSError) as error:
            run.leave_out(peer, f"it isn't installed: {error}")
    yield from _special_cases(others, chosen, clock, run)
    if _GROWTH not in others:
        return
    if growth is None:
        run.leave_out(_GROWTH, "the fit needs scipy, which isn't installed")
    else:
        grid = (_FEW_TENSORS, _FEW_ELEMENTS) if chosen.smoke else ()
        yield from growth.growth_cases(clock, *grid)


def _special_cases(
    others: Sequence[str], chosen: argparse.Namespace, clock: Clock, run: Run
) -> Iterator[Case]:
    """What isn't measured on all of the models."""
    elsewhere, where = (_CPU_ALONE, "CPU") if chosen.on_gpu else (_GPU_ALONE, "GPU")
    left = [peer for peer in elsewhere if peer in others]
    if left:
        run.leave_out(", ".join(left), f"measured on the {where} only")
    found = [peer for peer in others if peer not in elsewhere]
    lists = {peer: [_shapes(key, chosen.smoke) for key in _keys(peer, chosen)] for peer in found}
    if _COMPILED in found:
        if chosen.smoke and not chosen.rehearse:
            run.leave_out(_COMPILED, "compiling takes too long for a smoke run")
        else:
            pairs = [DTYPES[name] for name in ("float32", "mixed") if name in chosen.dtypes]
            yield from compiled.compiled_cases(lists[_COMPILED], pairs, clock)
    if _SHARDED in found:
        yield from sharded.sharded_cases(lists[_SHARDED], clock)
    if _APEX in found:
        try:
            yield from apex.apex_cases(lists[_APEX], clock)
        except (ImportError, OSError) as error:
            run.leave_out(_APEX, f"it isn't installed: {error}")
    if _STEP in found:
        if chosen.smoke:
            what = f"a training step, {step.COMPILED}"
            run.leave_out(what, "compiling takes too long for a smoke run")
        yield from step.step_cases((step.EAGER,) if chosen.smoke else (step.EAGER, step.COMPILED))
    if _BUSY in found:
        yield from busy_cases(lists[_BUSY], clock)


def _keys(peer: str, chosen: argparse.Namespace) -> Sequence[str]:
    if chosen.named_models:
        keys: list[str] = chosen.models
        return keys
    usual = (_GPU_LISTS_OF if chosen.on_gpu else _LISTS_OF).get(peer, ())
    return _SMOKE_LISTS if chosen.smoke else usual


def _shapes(key: str, smoke: bool) -> Shapes:
    return find(key).capped(_LONGEST) if smoke else find(key)


def _commit() -> Environment:
    """``EMA_FUSED_COMMIT`` names the commit where the checkout came without its history."""
    commit = output_of("git", "rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("EMA_FUSED_COMMIT", "unknown")}
    # Results themselves are written into the tree; they change nothing about what was measured.
    changes = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit if changes == "" else f"{commit}-dirty"}


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time averaged updates beside their peers."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"{', '.join(networks())}; MODEL*3 for three times over, COUNTxELEMENTS for equal "
        f"tensors (default: all, {' and '.join(_LISTS)}; on a GPU {' '.join(_GPU_MODELS)})",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        choices=(*_PEERS, *_GPU_ALONE),
        help=f"of {', '.join(_PEERS)}, {_APEX} (default: all that run on a CPU; on a GPU "
        f"{', '.join(_GPU_PEERS)})",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=tuple(DTYPES),
        default=list(DTYPES),
        help="of averages and sources; mixed: bfloat16 into float32 (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw pictures into it")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="torch's threads (default: its own)"
    )
    parser.add_argument(
        "--case-seconds", type=float, default=2.0, help="about as long a case (default: 2)"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no case after these"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny tensors: does it run at all? Measures nothing"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="what --device cuda runs, on the CPU with tiny tensors. Measures nothing",
    )
    chosen = parser.parse_args(arguments)
    chosen.smoke |= chosen.rehearse
    chosen.on_gpu = chosen.device == "cuda" or chosen.rehearse
    usual = _GPU_MODELS if chosen.on_gpu else (*networks(), *_LISTS)
    chosen.named_models = bool(chosen.models)
    few = _GPU_MODELS[:_REHEARSED] if chosen.rehearse else _SMOKE_MODELS
    chosen.models = chosen.models or list(few if chosen.smoke else usual)
    chosen.peers = chosen.peers or list(_GPU_PEERS if chosen.on_gpu else _PEERS)
    for key in chosen.models:
        try:
            find(key)
        except ValueError as error:
            parser.error(str(error))
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write and draw what was asked for; the exit status."""
    chosen = options(arguments)
    device = "cpu" if chosen.rehearse else chosen.device
    reason = why_no_gpu()
    if device == "cuda" and reason is not None:
        sys.stderr.write(f"nothing was measured and nothing is written: {reason}\n")
        return NO_GPU
    if chosen.pictures is not None:
        from benchmarks.pictures import draw  # not found out after an hour that it can't be
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    run = run_of(chosen, clock_of(device))
    for _ in measure(run, chosen):
        _write(run.report, chosen)  # after each case: a run that is cut short leaves what it had
    _write(run.report, chosen)
    sys.stdout.write(_about(run.report) + "\n")
    show(_tables(run.report), sys.stdout.write)
    if chosen.pictures is not None:
        for path in draw(run.report, chosen.pictures):
            sys.stdout.write(f"{path}\n")
    return 1 if run.report["failed"] else 0


def _tables(report: Report) -> list[Table]:
    is_gpus = "capability" in report["environment"] or report["rehearsal"]
    judged = targets.table(report) if is_gpus else []
    grown = [] if growth is None else growth.table(report)
    return [*judged, *grown, *tables(report), *step.table(report)]


def _about(report: Report) -> str:
    return (f"{_REHEARSAL}\n\n" if report["rehearsal"] else "") + about(report)


def _write(report: Report, chosen: argparse.Namespace) -> None:
    if chosen.json is not None:
        records.write(chosen.json, report)
    if chosen.markdown is not None:
        parts = [_about(report), *(markdown(table) for table in _tables(report))]
        chosen.markdown.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
