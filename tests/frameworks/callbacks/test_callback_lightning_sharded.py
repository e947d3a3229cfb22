"""Our callbacks under Lightning's strategies that shard the model, on two and four processes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.optim.swa_utils import get_ema_avg_fn

from ema_fused.converting import read_average
from ema_fused.converting.average_state import whole
from tests import ranks
from tests.frameworks.callbacks import lightning_sharded_run as run
from tests.frameworks.callbacks.lightning_cases import QUIET
from tests.frameworks.callbacks.lightning_sharded_cases import (
    RESUMED,
    State,
    assert_begins_with,
    averages,
    found,
    loss_of,
    mean,
    until,
)
from tests.networks import differences
from tests.ranks import Ranks

pytestmark = [QUIET, pytest.mark.slow]

NOTE = "weight_averaging.json"
LAST = 3 * run.BATCHES
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
_NEEDS = pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")
TRAINED = [
    *((way, folders) for way in ("fsdp1", "fsdp2", "tensor_parallel") for folders in (True, False)),
    *(pytest.param(way, True, marks=_NEEDS) for way in ("zero1", "zero2", "zero3")),
]
WAYS = pytest.mark.parametrize(("way", "folders"), TRAINED)
# Lightning can't test with a checkpoint of ZeRO-3: DeepSpeed's engine fails without an optimizer.
TESTED = pytest.mark.parametrize(("way", "folders"), TRAINED[:-1])
SHARDED = pytest.mark.parametrize("way", ["fsdp1", "fsdp2"])
SHARDED_OR_ZERO = pytest.mark.parametrize(
    "way", ["fsdp1", "fsdp2", pytest.param("zero2", marks=_NEEDS)]
)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks.started(2, run.IMPORTED) as processes:
        yield processes


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with ranks.started(4, run.IMPORTED) as processes:
        yield processes


@pytest.fixture(scope="module")
def trained(two: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """The folder of a training of three epochs on two processes, made when first asked for."""
    folders: dict[tuple[str, bool], Path] = {}

    def folder_of(way: str, in_folders: bool) -> Path:
        if (way, in_folders) not in folders:
            folder = tmp_path_factory.mktemp(way)
            two.run(partial(run.fit, folders=in_folders), folder, way)
            folders[way, in_folders] = folder
        return folders[way, in_folders]

    return folder_of


@WAYS
def test_the_averages_are_those_of_the_recorded_weights_and_nothing_is_sent(
    trained: Callable[[str, bool], Path], way: str, folders: bool
) -> None:
    seen = found(trained(way, folders))
    own = seen["own"]
    assert sorted(own) == list(range(1, LAST + 1))
    assert seen["n_averaged"] == LAST
    assert differences(seen["end"], averages(own)) == []
    assert seen["kept"] and found(trained(way, folders), 1)["kept"]
    assert seen["sent"] == 0
    assert seen["configured"] == 1  # by the strategy alone
    for step, loss in seen["losses"].items():
        evaluated = averages(until(own, step)) if step else seen["at_start"]["own"]
        assert loss == pytest.approx(loss_of(evaluated), rel=1e-5), f"after step {step}"
    assert loss_of(own[LAST]) != pytest.approx(seen["losses"][LAST], rel=1e-2)


@WAYS
def test_a_resumed_training_goes_on_to_the_bit(
    two: Ranks, trained: Callable[[str, bool], Path], tmp_path: Path, way: str, folders: bool
) -> None:
    whole = found(trained(way, folders))
    checkpoint = trained(way, folders) / f"step={RESUMED}.ckpt"
    assert checkpoint.is_dir() == folders
    two.run(partial(run.fit, folders=folders), tmp_path, way, checkpoint)
    resumed = found(tmp_path)
    assert_begins_with(resumed, whole["own"])
    assert sorted(resumed["own"]) == list(range(RESUMED + 1, LAST + 1))
    assert differences(resumed["end"], whole["end"]) == []


@WAYS
def test_a_checkpoint_is_read_without_lightning(
    trained: Callable[[str, bool], Path], way: str, folders: bool
) -> None:
    seen = found(trained(way, folders))
    state = read_average(trained(way, folders) / f"step={RESUMED}.ckpt")
    is_deepspeed = way.startswith("zero")
    assert state.format == ("ema_fused" if is_deepspeed else "lightning")
    assert state.steps == RESUMED
    expected = averages(until(seen["own"], RESUMED))
    assert differences(plain(state.averaged), expected) == []
    if is_deepspeed:
        assert state.raw is None  # in files of its own
    else:
        assert state.raw is not None
        assert differences(plain(state.raw), seen["own"][RESUMED]) == []


def plain(tensors: Mapping[str, Any]) -> State:
    return {name.removeprefix("network."): whole(one) for name, one in tensors.items()}


@pytest.mark.parametrize(("way", "folders"), TRAINED[:6])
def test_four_processes_go_on_with_what_two_have_saved(
    four: Ranks, trained: Callable[[str, bool], Path], tmp_path: Path, way: str, folders: bool
) -> None:
    saved = trained(way, folders)
    four.run(partial(run.fit, folders=folders), tmp_path, way, saved / f"step={RESUMED}.ckpt")
    resumed = found(tmp_path)
    assert_begins_with(resumed, found(saved)["own"])
    every = {RESUMED: resumed["at_start"]["averages"]} | resumed["own"]
    ema = get_ema_avg_fn(0.75)
    assert differences(resumed["end"], averages(every, function=ema)) == []


def test_two_ways_at_once(four: Ranks, tmp_path: Path) -> None:
    """FSDP2 and tensor parallel, on a mesh of two dimensions."""
    four.run(partial(run.fit, max_epochs=2), tmp_path / "whole", "both")
    whole = found(tmp_path / "whole")
    assert whole["sent"] == 0 and whole["kept"]
    assert differences(whole["end"], averages(whole["own"])) == []
    checkpoint = tmp_path / "whole" / f"step={run.BATCHES}.ckpt"
    four.run(partial(run.fit, max_epochs=2), tmp_path / "resumed", "both", checkpoint)
    assert_begins_with(found(tmp_path / "resumed"), whole["own"], run.BATCHES)
    assert differences(found(tmp_path / "resumed")["end"], whole["end"]) == []


@TESTED
def test_a_test_evaluates_the_averages_of_a_checkpoint_on_any_number_of_processes(
    four: Ranks, trained: Callable[[str, bool], Path], way: str, folders: bool
) -> None:
    saved = trained(way, folders)
    losses = four.run(run.evaluate, way, saved / f"step={RESUMED}.ckpt", folders)
    expected = loss_of(averages(until(found(saved)["own"], RESUMED)))
    assert losses == pytest.approx([expected] * 4, rel=1e-5)


@pytest.mark.parametrize("way", ["fsdp1", "fsdp2", "tensor_parallel"])
def test_a_file_is_loaded_by_the_original_in_one_process(
    trained: Callable[[str, bool], Path], tmp_path: Path, way: str
) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch import callbacks as theirs

    saved = trained(way, False)
    callback, model = theirs.EMAWeightAveraging(decay=0.75), run.Model("plain")
    own = found(saved)["own"]
    seen: list[State] = []

    class Look(theirs.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            average = callback._average_model.module.network
            seen.extend(
                {name: value.clone() for name, value in network.state_dict().items()}
                for network in (pl_module.network, average)
            )

    fitting = Trainer(
        accelerator="cpu", max_epochs=3, callbacks=[callback, Look()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = [(torch.zeros(6, 7), torch.zeros(6, 3))] * run.BATCHES
    loader = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    fitting.fit(model, loader, ckpt_path=saved / f"step={RESUMED}.ckpt", weights_only=False)
    assert differences(seen[0], own[RESUMED]) == []
    assert differences(seen[1], averages(until(own, RESUMED))) == []
    assert int(callback._average_model.n_averaged) == LAST


@pytest.mark.parametrize(("way", "folders"), [*TRAINED[:4], TRAINED[7]])
def test_saved_within_a_validation_or_early_or_late_each_checkpoint_says_which_is_which(
    two: Ranks, tmp_path: Path, way: str, folders: bool
) -> None:
    settings = {"folders": folders, "max_epochs": 1}
    two.run(partial(run.fit_with, **settings), "saving", tmp_path / "all", way)
    whole = found(tmp_path / "all")
    own, average = whole["own"], averages(until(whole["own"], 2))
    assert whole["kept"]
    assert whole["losses"][2] == pytest.approx(loss_of(average), rel=1e-5)  # after the save
    if folders:
        note = json.loads((tmp_path / "all" / "on_validation_batch_start.ckpt" / NOTE).read_text())
        has_own = way.startswith("zero")
        assert note["averaged"] == ("averaged_model_state" if has_own else ".")
        assert note["own"] == ("." if has_own else "current_model_state")
    went_on = partial(run.fit, folders=folders, max_epochs=2)
    inside = tmp_path / "all" / "on_validation_batch_start.ckpt"
    two.run(went_on, tmp_path / "inside", way, inside)
    started = found(tmp_path / "inside")["at_start"]
    assert started["n_averaged"] == 2
    assert differences(started["own"], own[2]) == []
    assert differences(started["averages"], average) == []

    if way != "fsdp1":  # Lightning can't resume its optimizer before a step
        two.run(went_on, tmp_path / "early", way, tmp_path / "all" / "on_train_start.ckpt")
        early = found(tmp_path / "early")
        assert early["at_start"]["n_averaged"] == 0
        assert differences(early["at_start"]["own"], whole["at_start"]["own"]) == []
        assert differences(early["end"], averages(early["own"])) == []

    two.run(went_on, tmp_path / "late", way, tmp_path / "all" / "on_fit_end.ckpt")
    late = found(tmp_path / "late")["at_start"]
    assert late["n_averaged"] == run.BATCHES
    assert differences(late["averages"], averages(own)) == []

    weights = tmp_path / "all" / "on_train_batch_start.ckpt"
    losses = two.run(run.evaluate, way, weights, folders)
    assert losses == pytest.approx([loss_of(average)] * 2, rel=1e-5)


def test_a_folder_s_weights_are_the_averages_for_any_reader(
    trained: Callable[[str, bool], Path],
) -> None:
    saved = trained("fsdp2", True)
    own = found(saved)["own"]
    checkpoint = saved / f"step={RESUMED}.ckpt"
    for folder, key, expected in [
        (checkpoint, "state_dict", averages(until(own, RESUMED))),
        (checkpoint / "current_model_state", "model", own[RESUMED]),
    ]:
        state = {f"network.{name}": torch.empty_like(value) for name, value in expected.items()}
        load({key: state}, storage_reader=FileSystemReader(folder), no_dist=True)
        read = {name.removeprefix("network."): value for name, value in state.items()}
        assert differences(read, expected) == []


@pytest.mark.parametrize(
    ("way", "folders"),
    [
        ("fsdp2", True),
        ("fsdp2", False),
        *(pytest.param(way, True, marks=_NEEDS) for way in ("zero2", "zero3")),
    ],
)
def test_a_bfloat16_model_s_average_is_kept_and_saved_in_float32(
    two: Ranks, tmp_path: Path, way: str, folders: bool
) -> None:
    fit = partial(run.fit, folders=folders, precision="bf16-true", max_epochs=2)
    two.run(fit, tmp_path / "whole", way)
    whole = found(tmp_path / "whole")
    assert whole["averages_in"] == "torch.float32" and whole["kept"]
    checkpoint = tmp_path / "whole" / f"step={run.BATCHES}.ckpt"
    two.run(fit, tmp_path / "resumed", way, checkpoint)
    resumed = found(tmp_path / "resumed")
    assert resumed["at_start"]["averages"]["first.weight"].dtype == torch.float32
    wide = {
        step: {
            name: value.float() if value.is_floating_point() else value
            for name, value in state.items()
        }
        for step, state in whole["own"].items()
    }
    average = averages(until(wide, run.BATCHES))
    for name, value in resumed["at_start"]["averages"].items():
        # The kernel converts in its registers, so that the last bit may differ.
        torch.testing.assert_close(value, average[name], rtol=1e-6, atol=1e-7)
    assert differences(resumed["at_start"]["own"], whole["own"][run.BATCHES]) == []
    assert differences(resumed["end"], whole["end"]) == []


@pytest.mark.parametrize(
    ("way", "folders"),
    [
        ("fsdp1", False),
        ("fsdp2", True),
        pytest.param("zero3", True, marks=_NEEDS),
        ("plain", False),
    ],
)
def test_a_checkpoint_without_an_average_begins_one_and_says_so_once(
    two: Ranks, tmp_path: Path, way: str, folders: bool
) -> None:
    two.run(run.fit_without, tmp_path / "without", way, folders)
    checkpoint = tmp_path / "without" / f"step={run.BATCHES}.ckpt"
    fit = partial(run.fit, folders=folders, max_epochs=2)
    two.run(fit, tmp_path / "with", way, checkpoint)
    seen = [found(tmp_path / "with", rank) for rank in (0, 1)]
    told = "not created with WeightAveraging" if way == "plain" else "has no average"
    assert [sum(told in text for text in each["warned"]) for each in seen] == [1, 0]
    started = seen[0]["at_start"]
    assert started["n_averaged"] == 0
    assert differences(started["averages"], started["own"]) == []
    assert differences(seen[0]["end"], averages(seen[0]["own"])) == []


@SHARDED
@pytest.mark.parametrize("kind", ["warmed up", "all warmed up", "mean"])
def test_functions_of_other_kinds_average_shards(
    two: Ranks, tmp_path: Path, way: str, kind: str
) -> None:
    two.run(partial(run.fit_with, max_epochs=1), kind, tmp_path, way)
    seen = found(tmp_path)
    own = seen["own"]
    if kind == "mean":
        for name, value in averages(own, function=mean, buffers=False).items():
            torch.testing.assert_close(seen["end"][name], value, rtol=1e-6, atol=1e-7)
    else:
        assert differences(seen["end"], averages(own, function=run.warmed_up)) == []


def test_a_function_that_looks_at_whole_tensors_is_refused(two: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="avg_fn averages a part of a tensor otherwise"):
        two.run(run.fit_with, "by norm", tmp_path, "fsdp2")


@pytest.mark.parametrize(
    ("way", "kind", "steps"),
    [
        *((way, "every second", [1, 3, 5, 7]) for way in ("fsdp1", "fsdp2")),
        *((way, "accumulated", [1, 2, 3, 4]) for way in ("fsdp1", "fsdp2")),
        # Manual optimization: in FSDP1 a backward pass isn't possible within the forward pass.
        ("fsdp2", "manual", [2, 4, 6, 8]),
        pytest.param("zero2", "accumulated", [1, 2, 3, 4], marks=_NEEDS),
        pytest.param("zero2", "skipped", [1, 2, 4, 5, 6, 7, 8], marks=_NEEDS),
    ],
)
def test_updates_follow_the_optimizer_s_steps(
    two: Ranks, tmp_path: Path, way: str, kind: str, steps: list[int]
) -> None:
    two.run(partial(run.fit_with, max_epochs=2), kind, tmp_path, way)
    seen = found(tmp_path)
    assert seen["n_averaged"] == len(steps)
    own = {step: state for step, state in seen["own"].items() if step in steps}
    assert differences(seen["end"], averages(own)) == []


@SHARDED_OR_ZERO
def test_a_validation_that_raises_leaves_the_model_its_weights(
    two: Ranks, tmp_path: Path, way: str
) -> None:
    two.run(run.fit_with, "failing", tmp_path, way)
    seen = found(tmp_path)
    assert differences(seen["end"], seen["own"][4]) == []


@SHARDED
def test_the_best_checkpoint_and_early_stopping_go_by_the_averages(
    two: Ranks, trained: Callable[[str, bool], Path], tmp_path: Path, way: str
) -> None:
    two.run(run.fit_with, "best", tmp_path, way)
    seen = found(tmp_path)
    losses = {step: loss for step, loss in seen["losses"].items() if step}
    assert float(seen["best"][0]) == pytest.approx(min(losses.values()), abs=0)
    *before, last_but_one, last = losses.values()
    assert last >= last_but_one and sorted(before, reverse=True) == before
    assert max(losses) < LAST


@pytest.mark.parametrize(
    "way", ["fsdp1", "fsdp2", "tensor_parallel", pytest.param("zero3", marks=_NEEDS)]
)
def test_a_model_made_on_meta_has_its_values_before_its_average(
    two: Ranks, tmp_path: Path, way: str
) -> None:
    two.run(partial(run.fit, meta=True, max_epochs=1), tmp_path, way)
    seen = found(tmp_path)
    assert differences(seen["at_start"]["averages"], seen["at_start"]["own"]) == []
    assert differences(seen["end"], averages(seen["own"])) == []


@pytest.mark.parametrize("way", ["fsdp2", pytest.param("zero2", marks=_NEEDS)])
def test_a_folder_of_two_steps_is_refused(
    two: Ranks, trained: Callable[[str, bool], Path], tmp_path: Path, way: str
) -> None:
    mixed = tmp_path / "mixed.ckpt"
    shutil.copytree(trained(way, True) / f"step={RESUMED}.ckpt", mixed)
    note = json.loads((mixed / NOTE).read_text())
    (mixed / NOTE).write_text(json.dumps(note | {"global_step": 3}))
    with pytest.raises(AssertionError, match="has averages of step 3 and a training of step 8"):
        two.run(run.fit, tmp_path / "resumed", way, mixed)


@pytest.mark.parametrize(
    ("way", "error"),
    [
        ("fsdp1", "begun: RuntimeError: "),
        ("fsdp2", "begun: AssertionError: FSDP does not support deepcopy"),
        ("tensor_parallel", "resumed: KeyError: 'state_dict'"),
        pytest.param("zero2", "resumed: KeyError: 'state_dict'", marks=_NEEDS),
    ],
)
def test_what_becomes_of_the_original(two: Ranks, tmp_path: Path, way: str, error: str) -> None:
    errors = two.run(run.theirs, tmp_path, way)
    assert all(each.startswith(error) for each in errors), errors
