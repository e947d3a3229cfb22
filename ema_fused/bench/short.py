"""The short benchmark: about a minute, on standard shapes or on the user's own model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ema_fused.bench.cases import BUSY_LISTS, busy_cases, own_model_cases, torch_cases
from ema_fused.bench.environment import environment, why_no_gpu
from ema_fused.bench.measuring import Case, Run
from ema_fused.bench.progress import tracked
from ema_fused.bench.shapes import find
from ema_fused.bench.tables import about, show, tables
from ema_fused.bench.timing import Clock, Effort, clock_of

_SHAPES = ("resnet50", "1000x1024", "1000x16")
_DTYPES = ("float32", "mixed")
_EFFORT = Effort(rounds=15, case_seconds=1.5)


def bench(
    device: str | None = None,
    model: str | None = None,
    json_file: Path | None = None,
    effort: Effort = _EFFORT,
    *,
    busy: bool = False,
) -> int:
    """Measures and prints tables of ratios; returns 1 if a case failed, else 0.

    Args:
        device: ``"cpu"`` or ``"cuda"``; None: CUDA if torch sees a GPU.
        model: ``"package.module:name"``, a model or a function without arguments that makes one;
            None: standard shapes are measured.
        json_file: a file to write all results to as well.
        effort: how long to measure.
        busy: measure, on the CPU, ours beside foreach while other processes take all cores; no
            other case is measured.

    Raises:
        ImportError: the module of ``model`` can't be imported.
        ValueError: ``model`` isn't of that form, doesn't exist, or is no model; or ``device`` is
            ``"cuda"`` and torch sees no GPU, or no native kernel serves it; or ``busy`` with
            ``"cuda"`` or a model.
    """
    if busy and (device == "cuda" or model is not None):
        raise ValueError("a busy machine is measured on the CPU, on lists of its own")
    reason = why_no_gpu()
    if device == "cuda" and reason is not None:
        raise ValueError(f"nothing can be measured on CUDA: {reason}")
    clock = clock_of(device or ("cpu" if reason or busy else "cuda"))
    cases = _busy_cases(clock) if busy else _cases(model, clock)
    run = Run(clock, effort, environment(clock.device))
    for _ in run.measure(tracked(cases)):
        pass
    sys.stdout.write(about(run.report) + "\n")
    show(tables(run.report), sys.stdout.write)
    if json_file is not None:
        json_file.write_text(json.dumps(run.report, indent=2) + "\n", encoding="utf-8")
    return 1 if run.report["failed"] else 0


def _cases(model: str | None, clock: Clock) -> list[Case]:
    if model is not None:
        return list(own_model_cases(own_model(model, clock.device), model, clock))
    return [case for key in _SHAPES for case in torch_cases(find(key), _DTYPES, clock)]


def _busy_cases(clock: Clock) -> list[Case]:
    return list(busy_cases([find(key) for key in BUSY_LISTS], clock))


def own_model(name: str, device: torch.device) -> nn.Module:
    """The model that ``"package.module:name"`` is or makes, moved to ``device`` from the CPU.

    Raises:
        ImportError, ValueError: as :func:`bench`.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(
            f"--model is {name!r}; it is package.module:name, where name is a model or a function "
            "without arguments that makes one"
        )
    # Makes modules in the current folder importable, as python -m does.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ValueError(f"--model is {name!r}, and {module_name} has no {attribute}")
    found = getattr(module, attribute)
    if not isinstance(found, nn.Module):
        found = _called(found, name) if callable(found) else found
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"--model is {name!r}, which gave {type(found).__name__} and not a torch.nn.Module"
        )
    return found.to(device) if all(p.device.type == "cpu" for p in found.parameters()) else found


def _called(build: Callable[[], object], name: str) -> object:
    try:
        return build()
    except Exception as error:
        raise ValueError(
            f"--model is {name!r}, and calling it without arguments failed: "
            f"{type(error).__name__}: {error}"
        ) from error
