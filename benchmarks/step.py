"""What an average adds to a whole training step: forward, backward, optimizer, average."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ema_fused
from benchmarks.compiled import compiled, compiling
from ema_fused.bench.contenders import FLOAT32, WEIGHT, Contender, Group
from ema_fused.bench.measuring import CannotMeasureError, Case, first_line
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.tables import Table, seconds, short
from ema_fused.bench.timing import (
    FEWEST_COLD_ROUNDS,
    Call,
    Clock,
    Effort,
    single_calls,
    summary,
)

EAGER, COMPILED = "eager", "under torch.compile"
WITHOUT = "no average"
WITHOUT_APART = f"{WITHOUT}, optimizer.step compiled by itself"
OURS = "ema_fused, update_parameters"
ATTACHED = "ema_fused.attach"
TORCH = "torch AveragedModel, foreach"

_BLOCKS, _WIDTH, _INPUTS, _OUTPUTS, _BATCH = 24, 128, 32, 8, 32
# Differences of steps are small beside the steps: they want more rounds than other cases.
_TIMES_AS_LONG = 5
_TOLERANCE = 1e-4  # of parameters that were trained alike

Entry = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A network in training, by itself.

    Attributes:
        name: the name of the contender.
        without: the contender that does the same without an average; None: this is one.
        step: one whole step.
        parameters: what is trained.
        averages: of the parameters; empty where there are none.
    """

    name: str
    without: str | None
    step: Call
    parameters: list[Tensor]
    averages: list[Tensor] = field(default_factory=list)


# ---- Contenders ----------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """A network of 100 parameters, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks: list[nn.Module] = []
        for _ in range(_BLOCKS):
            blocks += [nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH), nn.ReLU()]
        return nn.Sequential(nn.Linear(_INPUTS, _WIDTH), *blocks, nn.Linear(_WIDTH, _OUTPUTS))


def _ours(model: nn.Module) -> Any:
    return ema_fused.ExponentialMovingAverage(model, momentum=WEIGHT)


def _torchs(model: nn.Module) -> Any:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - WEIGHT))


def trained(mode: str) -> list[Trained]:
    """The networks of a mode, those without an average first."""
    found = [
        _trained(WITHOUT, mode),
        _trained(OURS, mode, _ours),
        _trained(ATTACHED, mode, _ours, attached=True),
        _trained(TORCH, mode, _torchs),
    ]
    if mode == COMPILED:
        found.insert(1, _trained(WITHOUT_APART, mode, attached=True))
        found[3] = replace(found[3], without=WITHOUT_APART)
    return found


def _trained(
    name: str, mode: str, average: Callable[[nn.Module], Any] | None = None, attached: bool = False
) -> Trained:
    """With ``attached`` the optimizer's step updates the average, and is compiled by itself."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.linspace(-1.0, 1.0, _BATCH * _INPUTS).view(_BATCH, _INPUTS)
    averaged = None if average is None else average(model)
    if averaged is not None:
        averaged.update_parameters(model)  # the first call copies
        if attached:
            ema_fused.attach(optimizer, model, averaged)

    def learn() -> None:
        model(batch).square().mean().backward()

    optimize: Call = optimizer.step
    if mode == COMPILED and attached:
        learn, optimize = compiled(learn), compiled(optimizer.step)

    def step() -> None:
        learn()
        optimize()
        optimizer.zero_grad()
        if averaged is not None and not attached:
            averaged.update_parameters(model)

    whole = compiled(step) if mode == COMPILED and not attached else step
    return Trained(
        name,
        None if average is None else WITHOUT,
        partial(_with_gradients, whole),
        [p.detach() for p in model.parameters()],
        [] if averaged is None else [p.detach() for p in averaged.module.parameters()],
    )


def _with_gradients(step: Call) -> None:
    with torch.enable_grad():
        step()


def check(networks: Sequence[Trained]) -> None:
    """Raises unless a step trains all alike, and each average moves to what was trained.

    Raises:
        AssertionError: naming the contender.
    """
    first = networks[0]
    for one in networks:
        before = [average.clone() for average in one.averages]
        one.step()
        if before:
            torch._foreach_lerp_(before, one.parameters, WEIGHT)
        _compare(f"the average of {one.name}", one.averages, before, 1e-6)
        _compare(f"what is trained beside {one.name}", one.parameters, first.parameters, _TOLERANCE)


def _compare(
    what: str, found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float
) -> None:
    for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
            raise AssertionError(f"{what} differs from torch at tensor {index}")


# ---- Cases ---------------------------------------------------------------------------------------


def step_cases(modes: Sequence[str] = (EAGER, COMPILED)) -> Iterator[Case]:
    """A case for each mode, on the CPU."""
    parameters = [tuple(p.shape) for p in network().parameters()]
    shapes = Shapes("step", f"{len(parameters)} parameters", parameters, "made up")
    for mode in modes:
        needed = 30 * 4 * shapes.elements  # five networks, with gradients, moments and averages
        yield Case(
            "step", "torch", f"a training step, {mode}", shapes, FLOAT32, needed,
            partial(_made, mode), measure,
        )  # fmt: skip


def _made(mode: str) -> Group:
    torch.compiler.reset()
    networks = trained(mode)
    if mode == COMPILED:
        try:
            with compiling():
                for _ in range(2):  # gradients are there at the second step only
                    for one in networks:
                        one.step()
        except Exception as error:
            raise CannotMeasureError(f"torch.compile failed: {first_line(error)}") from error
    without = {one.name: one.without for one in networks}
    return StepGroup(
        [Contender(one.name, [one.step]) for one in networks],
        FLOAT32.bytes_moved() * sum(p.numel() for p in networks[0].parameters),
        partial(check, networks),
        without=without,
    )


@dataclass(frozen=True)
class StepGroup(Group):
    """Steps; ``without`` names of each the one that does the same without an average."""

    without: dict[str, str | None] = field(default_factory=dict)


def measure(clock: Clock, group: Group, effort: Effort) -> dict[str, Any]:
    """What a report says: single steps in turns, and the differences within a round."""
    assert isinstance(group, StepGroup)
    calls = {contender.name: contender.calls[0] for contender in group.contenders}
    longer = replace(
        effort,
        rounds=_TIMES_AS_LONG * effort.rounds,
        case_seconds=_TIMES_AS_LONG * effort.case_seconds,
    )
    samples = single_calls(calls, longer, FEWEST_COLD_ROUNDS)
    first = statistics.median(samples[WITHOUT])
    contenders: list[Entry] = []
    for name, found in samples.items():
        entry: Entry = {
            "name": name,
            "ratio": statistics.median(found) / first,
            "limit_fraction": None,
            "timing": asdict(summary(found, 1)),
        }
        without = group.without[name]
        if without is not None:
            pairs = zip(found, samples[without], strict=True)
            added = summary([of_one - of_other for of_one, of_other in pairs], 1)
            entry["added"] = asdict(added)
            entry["added_fraction"] = added.median / statistics.median(samples[without])
        contenders.append(entry)
    return {"condition": "step", "limit": None, "contenders": contenders}


def table(report: dict[str, Any]) -> list[Table]:
    """What each average adds, with a column per mode; nothing where no step was measured."""
    cases = [case for case in report["cases"] if case["kind"] == "step"]
    if not cases:
        return []
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["contenders"]))
    rows = [[name, *(_cell(case, name) for case in cases)] for name in names]
    note = (
        f"On a network of {cases[0]['tensors']} parameters with torch's AdamW: the median over "
        "rounds of the step with the average minus the step without it, and that as a fraction of "
        "the step (half the distance of the quartiles). Without an average: the step itself."
    )
    heads = ["", *(case["title"] for case in cases)]
    return [Table("What an average adds to a training step", heads, rows, note)]


def _cell(case: Entry, name: str) -> str:
    for contender in case["contenders"]:
        if contender["name"] == name:
            if "added" not in contender:
                return f"a step: {seconds(contender['timing']['median'])}"
            added = contender["added"]
            spread = seconds((added["upper_quartile"] - added["lower_quartile"]) / 2)
            percent = short(100 * contender["added_fraction"])
            return f"{seconds(added['median'])}, {percent}% (±{spread})"
    return ""
