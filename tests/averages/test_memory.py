"""Bytes a parameter: what each option of an average keeps, and takes while it is made and used.

docs/large_models.md tells these numbers; the table there is compared with what is measured here.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from tests import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "large_models.md"
COLUMNS = ("kept", "made", "update", "swapped")
LAYERS, WIDTH = 16, 256
PARAMETERS = LAYERS * WIDTH * WIDTH

OPTIONS: dict[str, dict[str, Any]] = {
    "(none)": {},
    "averaged_dtype=torch.float32": {"averaged_dtype": torch.float32},
    'rounding="stochastic"': {"rounding": "stochastic"},
    "share_frozen=True": {"share_frozen": True},
    "every=10": {"every": 10},
    "capturable=True": {"capturable": True},
    "distance_every=1": {"distance_every": 1},
    'offload="cpu", averaged_dtype=torch.float32': {
        "offload": "cpu",
        "averaged_dtype": torch.float32,
    },
}


def bfloat16_model(*, frozen: bool = False) -> nn.Module:
    layers = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
    model = nn.Sequential(*layers).to(torch.bfloat16)
    if frozen:  # but for one layer
        model[1:].requires_grad_(False)
    return model


def memory(action: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes of new memory in use at once while ``action`` runs, and how many it keeps."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = action()
        if isinstance(kept, Tensor):
            kept = None
    events = profile.profiler.kineto_results.events()
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    levels = [0, *itertools.accumulate(size for _, size in sorted(changes))]
    del kept
    return max(levels), levels[-1]


def bytes_a_parameter(kind: Any, options: dict[str, Any]) -> dict[str, float]:
    """Of a bfloat16 model: kept; the peak while it is made; the peak of updates and evaluation."""
    model = bfloat16_model(frozen="share_frozen" in options)
    made: list[Any] = []
    peak, kept = memory(lambda: made.append(kind(model, 0.1, **options)))
    averaged = made.pop()
    averaged.update_parameters(model, asynchronous=True)
    averaged.flush()  # plans and staging buffers are there from here on

    def update() -> None:
        for _ in range(3):
            averaged.update_parameters(model, asynchronous=True)
            averaged.flush()

    def evaluate() -> None:
        with averaged.swapped(model):
            pass

    found = {
        "kept": kept,
        "made": peak,
        "update": memory(update)[0],
        "swapped": memory(evaluate)[0],
    }
    return {what: size / PARAMETERS for what, size in found.items()}


def promised() -> dict[str, dict[str, float]]:
    """The table of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = lines.index("| option | keeps | while made | update | `swapped()` |") + 2
    rows = {}
    for line in itertools.takewhile(bool, lines[begin:]):
        name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = dict(zip(COLUMNS, map(float, numbers), strict=True))
    return rows


def test_the_page_tells_of_every_option() -> None:
    assert list(promised()) == list(OPTIONS)


@pytest.mark.filterwarnings("ignore:averages are kept in 16 bits")
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")  # the step here takes no time
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [AveragedWeights, ExponentialMovingAverage])
def test_it_takes_the_bytes_that_the_page_promises(kind: Any, name: str) -> None:
    measured = bytes_a_parameter(kind, OPTIONS[name])
    for what, promise in promised()[name].items():
        # 0.05: scalars, and the tables of plans, which are larger beside so small a model.
        beside = 0.05
        if what == "swapped" and promise:  # what was written in the block is told by 3 bytes each,
            beside += 3 / LAYERS  # of a layer at a time (of a million elements at most)
        assert measured[what] <= promise + beside, (what, measured)
        assert measured[what] >= promise - 0.05, (what, measured)
