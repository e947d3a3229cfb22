"""Saved, loaded and resumed: our ``EMAHook`` and mmengine's own go on from each other's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused.hooks import mmengine as ours
from tests import processes
from tests.frameworks.hooks.ema_hooks import (
    KINDS,
    LOOPS,
    OURS,
    QUIET,
    THEIRS,
    trained_both,
    unequal,
)
from tests.frameworks.hooks.mmengine_runs import (
    Net,
    Run,
    broken_off,
    build,
    comparable,
    differences,
    load,
    trained,
)
from tests.networks import snapshot

pytestmark = QUIET

BREAK = 12  # before this iteration runs end; the last checkpoint is of the iteration 10
LAST = {"epochs": "epoch_4.pth", "iterations": "iter_20.pth"}
# Momentum depends on the steps, and not every step averages.
ANNEALING = {**KINDS["annealing"], "interval": 3}


def unequal_files(one: Path, other: Path) -> list[str]:
    """Metrics apart: mmengine saves before it validates, and forgets those when it resumes."""
    found = [comparable(load(file)) for file in (one, other)]
    for checkpoint in found:
        scalars = checkpoint["scalars"]
        checkpoint["scalars"] = {n: s for n, s in scalars.items() if not n.startswith("val/")}
        assert {"train/loss"} <= set(checkpoint["scalars"])
    return differences(*found)


def assert_resumes(whole: Run, then: dict[str, Any], folder: Path, loop: str) -> Run:
    """That ``then``, resumed in ``folder``, comes to the same as ``whole``."""
    resumed = trained(then, folder, resume=True, **LOOPS[loop])
    assert isinstance(resumed.hook(), ours.EMAHook) == (then["type"] == OURS)
    assert unequal_files(whole.folder / LAST[loop], folder / LAST[loop]) == []
    assert resumed.metrics == whole.metrics[2:]
    assert differences(snapshot(whole.hook().ema_model), snapshot(resumed.hook().ema_model)) == []
    assert differences(snapshot(whole.model), snapshot(resumed.model)) == []
    return resumed


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sides",
    [(OURS, OURS), (THEIRS, OURS), (OURS, THEIRS)],
    ids=["ours", "theirs-in-ours", "ours-in-theirs"],
)
def test_a_resumed_run_is_equal_to_one_that_was_never_broken_off(
    sides: tuple[str, str], kind: str, loop: str, tmp_path: Path
) -> None:
    hook = {**KINDS[kind], "interval": 3, "strict_load": True}
    first, then = ({"type": side, **hook} for side in sides)
    whole = trained({"type": THEIRS, **hook}, tmp_path / "whole", **LOOPS[loop])
    broken_off(first, tmp_path / "parts", BREAK, **LOOPS[loop])
    assert_resumes(whole, then, tmp_path / "parts", loop)


def test_a_run_with_weights_left_out_resumes_too(tmp_path: Path) -> None:
    hook = {"type": OURS, **ANNEALING, "exclude": r"^head\.", "strict_load": True}
    whole = trained(hook, tmp_path / "whole", **LOOPS["epochs"])
    broken_off(hook, tmp_path / "parts", BREAK, **LOOPS["epochs"])
    resumed = assert_resumes(whole, hook, tmp_path / "parts", "epochs")
    assert resumed.hook().ema_model.left_out_names == ["head.weight", "head.bias"]
    saved = load(whole.folder / LAST["epochs"])
    averages, own = saved["state_dict"], saved["ema_state_dict"]
    assert torch.equal(averages["head.weight"], own["module.head.weight"])
    assert not torch.equal(averages["conv.weight"], own["module.conv.weight"])


@pytest.mark.parametrize("begin", [{}, {"begin_iter": 14}, {"begin_epoch": 4}], ids=str)
@pytest.mark.parametrize("update_buffers", [False, True], ids=["parameters", "buffers-too"])
def test_a_lenient_run_resumes_as_well_and_where_averaging_has_not_begun(
    update_buffers: bool, begin: dict[str, int], tmp_path: Path
) -> None:
    hook = {"type": OURS, **ANNEALING, "update_buffers": update_buffers, **begin}
    whole = trained(hook, tmp_path / "whole", **LOOPS["epochs"])
    broken_off(hook, tmp_path / "parts", BREAK, **LOOPS["epochs"])
    resumed = assert_resumes(whole, hook, tmp_path / "parts", "epochs")
    assert not [message for message in resumed.messages if "checkpoint" in message]


def test_a_run_resumed_in_a_new_process_is_equal_to_one_that_was_never_broken_off(
    tmp_path: Path,
) -> None:
    hook = {"type": OURS, **KINDS["annealing"], "interval": 3}
    for loop in LOOPS:
        trained(hook, tmp_path / loop / "whole", **LOOPS[loop])
        broken_off(hook, tmp_path / loop / "parts", BREAK, **LOOPS[loop])
    processes.run_fork(
        "mmengine.runner",
        "-c",
        "import sys\n"
        "from tests.frameworks.hooks.ema_hooks import LOOPS, Path\n"
        "from tests.frameworks.hooks.mmengine_runs import trained\n"
        f"for loop in LOOPS:\n"
        f"    trained({hook}, Path(sys.argv[1], loop, 'parts'), resume=True, **LOOPS[loop])\n",
        tmp_path,
    )
    for loop in LOOPS:
        folder = tmp_path / loop
        assert unequal_files(folder / "whole" / LAST[loop], folder / "parts" / LAST[loop]) == []


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("resume", [False, True], ids=["load", "resume"])
def test_a_checkpoint_without_an_average_starts_both_alike(
    resume: bool, strict: bool, tmp_path: Path
) -> None:
    trained(None, tmp_path, epochs=2, seed=5)
    arguments = {"load_from": tmp_path / "epoch_2.pth", "resume": resume, "epochs": 4}
    hook = {**ANNEALING, "strict_load": strict}
    both = trained_both(tmp_path, hook, **arguments)
    assert unequal(*both) == []
    assert both[1].hook().ema_model.steps == (10 if resume else 20)
    for run in both:
        said = [message for message in run.messages if "ema_state_dict" in message]
        assert len(said) == resume


@pytest.mark.parametrize("writer", [THEIRS, OURS], ids=["theirs", "ours"])
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_a_checkpoint_that_is_only_loaded_starts_both_alike(
    strict: bool, writer: str, tmp_path: Path
) -> None:
    """Model and average begin with its averages, and count from 0."""
    trained({"type": writer, **ANNEALING}, tmp_path, epochs=2, seed=5)
    file = tmp_path / "epoch_2.pth"
    hook = {**ANNEALING, "strict_load": strict}
    assert unequal(*trained_both(tmp_path, hook, load_from=file, epochs=2)) == []
    run = build({"type": OURS, **hook}, tmp_path / "loaded", load_from=file)
    run.val()
    averages = load(file)["state_dict"]
    assert differences(dict(averages), dict(run.model.state_dict())) == []
    assert differences(dict(averages), dict(run.hook().ema_model.module.state_dict())) == []
    assert run.hook().ema_model.steps == 0


class Versioned(Net):
    """Before its version 2 the head was called ``fc``: many models rename what they load so."""

    _version = 2

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        if local_metadata.get("version") is None:
            for name in [name for name in state_dict if name.startswith(f"{prefix}head.")]:
                state_dict[name.replace("head.", "new_head.")] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_versions_of_modules_are_known_when_an_average_is_loaded(tmp_path: Path) -> None:
    """They travel beside the tensors, as ``_metadata`` of the state."""
    trained({"type": OURS, **ANNEALING}, tmp_path, epochs=1, model=Versioned)
    hook = {**ANNEALING, "strict_load": True}
    for resume in (False, True):
        arguments = {"load_from": tmp_path / "epoch_1.pth", "resume": resume, "model": Versioned}
        assert unequal(*trained_both(tmp_path / str(resume), hook, epochs=2, **arguments)) == []


def bfloat16_net() -> nn.Module:
    return Net().to(torch.bfloat16)


def test_averages_in_float32_of_a_bfloat16_model(tmp_path: Path) -> None:
    hook = {"type": OURS, **ANNEALING, "averaged_dtype": torch.float32}
    arguments = {**LOOPS["epochs"], "model": bfloat16_net}
    whole = trained(hook, tmp_path / "whole", **arguments)
    broken_off(hook, tmp_path / "parts", BREAK, **arguments)
    resumed = trained(hook, tmp_path / "parts", resume=True, **arguments)
    assert unequal_files(whole.folder / "epoch_4.pth", resumed.folder / "epoch_4.pth") == []
    assert resumed.metrics == whole.metrics[2:]

    found = whole.checkpoint("epoch_4.pth")
    average, model = whole.hook().ema_model.module, whole.model
    assert differences(dict(found["state_dict"]), dict(average.state_dict())) == []
    assert found["state_dict"]["head.weight"].dtype == torch.float32
    raw = {name: found["ema_state_dict"][f"module.{name}"] for name in model.state_dict()}
    assert differences(raw, dict(model.state_dict())) == []
    assert raw["head.weight"].dtype == torch.bfloat16
    # A float32 average of bfloat16 values is none of those: what was evaluated are the averages.
    tested = build(hook, tmp_path / "test", load_from=whole.folder / "epoch_4.pth", **arguments)
    assert tested.test().metrics == [whole.metrics[-1]]
    assert build(None, tmp_path / "raw", **arguments).test().metrics != tested.metrics


DISTRIBUTED = """
import functools, os, sys, torch
from pathlib import Path
from tests.frameworks.hooks.ema_hooks import KINDS, LOOPS, OURS, THEIRS
from tests.frameworks.hooks.mmengine_runs import Images, broken_off, trained
from torch.nn.parallel import DistributedDataParallel
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
# mmengine's own launcher insists on a GPU for each process.
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)
arguments = {
    "launcher": "pytorch",
    "cfg": {"model_wrapper_cfg": {"device_ids": None}},
    "dataset": functools.partial(Images, 80),
    **LOOPS["epochs"],
}
for side in (THEIRS, OURS):
    hook = {"type": side, **KINDS["annealing"], "interval": 3}
    run = trained(hook, folder / side / "whole", **arguments)
    assert isinstance(run.runner.model, DistributedDataParallel)
    broken_off(hook, folder / side / "parts", 12, **arguments)
    torch.distributed.barrier()
    resumed = trained(hook, folder / side / "parts", resume=True, **arguments)
    for part in (run, resumed):
        torch.save(part.everything(), part.folder / f"everything_{rank}")
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_a_model_in_distributed_data_parallel_is_equal_to_the_bit(tmp_path: Path) -> None:
    environment = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        processes.fork(
            "mmengine.runner",
            "-c",
            DISTRIBUTED,
            tmp_path,
            RANK=rank,
            LOCAL_RANK=rank,
            **environment,
        )
        for rank in ("0", "1")
    ]
    processes.finish_group(ranks)
    folders = [tmp_path / side for side in (THEIRS, OURS)]
    for rank in (0, 1):
        whole = [load(folder / "whole" / f"everything_{rank}") for folder in folders]
        assert differences(*whole) == []
        parts = load(folders[1] / "parts" / f"everything_{rank}")
        for what in ("model", "average"):
            assert differences(whole[1][what], parts[what]) == []
        assert parts["metrics"] == whole[1]["metrics"][2:]
    file = folders[1] / "whole" / "epoch_4.pth"
    assert list(load(file)["state_dict"]) == list(Net().state_dict())
    assert unequal_files(file, folders[1] / "parts" / "epoch_4.pth") == []
