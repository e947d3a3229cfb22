"""On a GPU: our callback in Lightning's own Trainer, by itself and under strategies that shard."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import device, ranks
from tests.networks import differences
from tests.ranks import Ranks

# Skips where Lightning, say, is missing.
cases: Any = pytest.importorskip("tests.frameworks.callbacks.lightning_sharded_cases")
run: Any = cases.run

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IMPORTED = [name for name in run.IMPORTED if importlib.util.find_spec(name) is not None]
_NEEDS = pytest.mark.skipif("deepspeed" not in IMPORTED, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    with ranks.started(1, imported=IMPORTED, kind=device.DEVICE) as started:
        yield started


@pytest.mark.parametrize("way", ["plain", "fsdp2", pytest.param("zero3", marks=_NEEDS)])
def test_averages_are_those_of_the_recorded_weights_to_the_bit(
    processes: Ranks, tmp_path: Path, way: str
) -> None:
    processes.run(run.fit, tmp_path / "whole", way)
    whole = cases.found(tmp_path / "whole")
    own, last = whole["own"], 3 * run.BATCHES
    assert sorted(own) == list(range(1, last + 1))
    assert {tensor.device.type for tensor in whole["end"].values()} == {device.DEVICE}
    assert differences(whole["end"], cases.averages(own)) == []
    assert whole["n_averaged"] == last
    assert whole["kept"] and whole["sent"] == 0
    for step, loss in whole["losses"].items():
        evaluated = cases.averages(cases.until(own, step)) if step else whole["at_start"]["own"]
        assert loss == pytest.approx(cases.loss_of(evaluated), rel=1e-4), f"after step {step}"
    checkpoint = tmp_path / "whole" / f"step={cases.RESUMED}.ckpt"
    processes.run(run.fit, tmp_path / "resumed", way, checkpoint)
    resumed = cases.found(tmp_path / "resumed")
    cases.assert_begins_with(resumed, own)
    # Gradients may differ from run to run: what follows the checkpoint is recorded anew.
    before = {step: state for step, state in own.items() if step <= cases.RESUMED}
    assert differences(resumed["end"], cases.averages(before | resumed["own"])) == []
