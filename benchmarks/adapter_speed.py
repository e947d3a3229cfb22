"""How long one update by an EMA wrapper takes: by the wrapper itself, and by ours in its place.

   python benchmarks/adapter_speed.py [--sets resnet50 1000x1024 gpt2-small] [--threads 2]
       [--json FILE]

The wrappers are the real classes, on networks of their own with equal values; timm's is loaded from
where `make` unpacked it. Before they are timed, in turns, both go through some updates with new
weights before each, and must hold the same: to the bit where the arithmetic is the same, else
within float32's rounding. The stateless calls get fresh lists each time, as
torch's ``AveragedModel`` makes them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import contenders
import hook_speed
import shapes
import timing
import torch
import update_speed
from hook_speed import ORIGINAL, OURS
from torch import Tensor, nn
from torch.optim import swa_utils

SETS = ("resnet50", "1000x1024", "gpt2-small")
DECAY = 0.999
_TIMM = "timm==1.0.31"
_PACKAGES = ("diffusers", "ema-pytorch", "torch-ema")
_TESTS = Path(__file__).parent.parent / "tests"
_UPDATES_TO_CHECK = 3


@dataclass(frozen=True)
class Side:
    """A wrapper on a network of its own, and what it averages into."""

    update: Callable[[], object]
    model: nn.Module
    averages: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Wrapped:
    """A wrapper by itself and by ours; ``exact`` where both round alike."""

    name: str
    ours: Side
    original: Side
    exact: bool


def wrappers(values: list[Tensor]) -> Iterator[Wrapped]:
    """All of them, one after another, so that each frees its memory."""
    sys.path.append(str(_TESTS))
    load = importlib.import_module
    timm = load("adapter_cases").timm_originals()
    with_timm = load("ema_fused.adapters.timm")
    ours = {
        name: load(f"ema_fused.adapters.{name}")
        for name in ("swa_utils", "diffusers", "ema_pytorch", "torch_ema")
    }
    theirs = {
        "diffusers": load("diffusers.training_utils"),
        "ema_pytorch": load("ema_pytorch"),
        "torch_ema": load("torch_ema"),
    }

    def both(
        name: str, side: Callable[[Any, list[Tensor]], Side], mine: Any, original: Any, exact: bool
    ) -> Wrapped:
        return Wrapped(name, side(mine, values), side(original, values), exact)

    swa = ours["swa_utils"]
    yield both("torch AveragedModel, EMA", _averaged_model_ema, swa, swa_utils, True)
    yield both("torch AveragedModel, mean", _averaged_model_mean, swa, swa_utils, False)
    yield both("torch get_ema_multi_avg_fn on lists", _stateless, swa, swa_utils, True)
    yield both("timm ModelEmaV3", _timm_v3, with_timm, timm, True)
    yield both("timm ModelEmaV2", _timm_v2, with_timm, timm, True)
    yield both("diffusers EMAModel", _diffusers, ours["diffusers"], theirs["diffusers"], False)
    yield both(
        "diffusers EMAModel, foreach",
        _diffusers_foreach,
        ours["diffusers"],
        theirs["diffusers"],
        True,
    )
    yield both("ema-pytorch EMA", _ema_pytorch, ours["ema_pytorch"], theirs["ema_pytorch"], True)
    yield both("torch-ema", _torch_ema, ours["torch_ema"], theirs["torch_ema"], False)


def _network(values: list[Tensor]) -> nn.Module:
    return contenders.module_of([tensor.clone() for tensor in values])


def _averaged_model(module: Any, values: list[Tensor], **arguments: Any) -> Side:
    model = _network(values)
    averaged = module.AveragedModel(model, **arguments)
    averaged.update_parameters(model)  # the first call copies
    return Side(
        lambda: averaged.update_parameters(model), model, lambda: list(averaged.module.parameters())
    )


def _averaged_model_ema(module: Any, values: list[Tensor]) -> Side:
    return _averaged_model(module, values, multi_avg_fn=module.get_ema_multi_avg_fn(DECAY))


def _averaged_model_mean(module: Any, values: list[Tensor]) -> Side:
    return _averaged_model(module, values)


def _stateless(module: Any, values: list[Tensor]) -> Side:
    model = _network(values)
    averages = [tensor.clone() for tensor in values]
    function = module.get_ema_multi_avg_fn(DECAY)

    def update() -> None:
        function(
            [tensor.detach() for tensor in averages], [p.detach() for p in model.parameters()], 1
        )

    return Side(update, model, lambda: averages)


def _timm_v3(module: Any, values: list[Tensor]) -> Side:
    model = _network(values)
    wrapper = module.ModelEmaV3(model, decay=DECAY)
    return Side(lambda: wrapper.update(model), model, lambda: list(wrapper.module.parameters()))


def _timm_v2(module: Any, values: list[Tensor]) -> Side:
    model = _network(values)
    wrapper = module.ModelEmaV2(model, decay=DECAY)
    return Side(lambda: wrapper.update(model), model, lambda: list(wrapper.module.parameters()))


def _diffusers(module: Any, values: list[Tensor], foreach: bool = False) -> Side:
    model = _network(values)
    wrapper = module.EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach)
    wrapper.step(model.parameters())  # the first call copies
    return Side(lambda: wrapper.step(model.parameters()), model, lambda: wrapper.shadow_params)


def _diffusers_foreach(module: Any, values: list[Tensor]) -> Side:
    return _diffusers(module, values, foreach=True)


def _ema_pytorch(module: Any, values: list[Tensor]) -> Side:
    model = _network(values)
    wrapper = module.EMA(model, beta=DECAY, min_value=DECAY, update_after_step=0, update_every=1)
    for _ in range(2):  # the first calls copy
        wrapper.update()
    return Side(wrapper.update, model, lambda: list(wrapper.ema_model.parameters()))


def _torch_ema(module: Any, values: list[Tensor]) -> Side:
    model = _network(values)
    wrapper = module.ExponentialMovingAverage(
        model.parameters(), decay=DECAY, use_num_updates=False
    )
    return Side(wrapper.update, model, lambda: wrapper.shadow_params)


def check(wrapped: Wrapped, seed: int) -> None:
    """Raise unless both sides hold the same after each of some updates."""
    for update in range(_UPDATES_TO_CHECK):
        for side in (wrapped.ours, wrapped.original):
            generator = torch.Generator().manual_seed(seed + update)
            with torch.no_grad():
                for parameter in side.model.parameters():
                    parameter.normal_(generator=generator)
            side.update()
        pairs = zip(wrapped.ours.averages(), wrapped.original.averages(), strict=True)
        for place, (found, wanted) in enumerate(pairs):
            same = (
                torch.equal(found, wanted)
                if wrapped.exact
                else torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
            )
            if not same:
                raise AssertionError(
                    f"{wrapped.name}: tensor {place} of shape {tuple(wanted.shape)} differs from "
                    f"the original's after update {update + 1}"
                )


def measure(
    sets: dict[str, list[shapes.Shape]], rounds: int, sample_seconds: float, seed: int
) -> list[update_speed.Row]:
    """Check and time all wrappers on these sets of shapes: two rows each, ours first."""
    rows = []
    for set_name, set_shapes in sets.items():
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator) for shape in set_shapes]
        for wrapped in wrappers(values):
            print(f"measuring {set_name}, {wrapped.name}", file=sys.stderr, flush=True)
            check(wrapped, seed + 1)
            timings = timing.time_in_turns(
                {OURS: wrapped.ours.update, ORIGINAL: wrapped.original.update},
                rounds,
                sample_seconds,
            )
            rows += [
                update_speed.Row(
                    wrapped.name, set_name, which, found.median / timings[OURS].median, found
                )
                for which, found in timings.items()
            ]
    return rows


def main() -> None:
    """Measure, print the table, and write the JSON where it was asked for."""
    chosen = hook_speed.options(sets=SETS)
    torch.set_num_threads(chosen.threads)
    sets = {name: shapes.SHAPE_SETS[name]() for name in chosen.sets}
    rounds, sample_seconds = chosen.rounds, timing.SAMPLE_SECONDS
    if chosen.quick:
        sets = {f"quick-{name}": shapes.capped(found, 4) for name, found in sets.items()}
        rounds, sample_seconds = 2, 0.0
    rows = measure(sets, rounds, sample_seconds, chosen.seed)
    packages = [f"{name}=={importlib.metadata.version(name)}" for name in _PACKAGES]
    about = update_speed.environment() | {"originals": " ".join([*packages, _TIMM])}
    print(hook_speed.markdown(rows, about))
    if chosen.json is not None:
        report = {"environment": about, "results": [asdict(row) for row in rows]}
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
