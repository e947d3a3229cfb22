"""Our hooks beside mmcv's and mmdet 2's in mmcv's runners: the same bits, the same checkpoints.

What is different on purpose is in ``test_hooks_mmcv_differences.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import processes
from tests.frameworks.hooks.mmcv_runs import (
    BATCHES,
    OURS,
    THEIRS,
    assert_same,
    assert_same_checkpoints,
    in_new_processes,
    load,
    mmcv_parallel,
    mmcv_runner,
    net,
    run,
    run_both,
)
from tests.networks import CPU_BACKENDS, differences

pytestmark = [
    # Who serves 16-bit averages, and how mmcv writes add_, is not the point here.
    pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning"),
    pytest.mark.filterwarnings("ignore:This overload of add_ is deprecated"),
]

# Momenta large enough, and schedules short enough, that all of them shows in a short training.
EMA = ("EMAHook", {"momentum": 0.5, "warm_up": 20})
EXP = ("ExpMomentumEMAHook", {"momentum": 0.01, "total_iter": 30})
BUFFERS_TOO = {
    "base": ("BaseEMAHook", {"momentum": 0.05}),
    "momentum_fun": ("BaseEMAHook", {"momentum_fun": lambda step: 1 / (2 + step)}),
    "exp": EXP,
    "linear": ("LinearMomentumEMAHook", {"momentum": 0.5, "warm_up": 20}),
}
HOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mmcv": EMA,
    **BUFFERS_TOO,
    **{
        f"{kind}-parameters": (name, {**arguments, "skip_buffers": True})
        for kind, (name, arguments) in BUFFERS_TOO.items()
    },
}


# The same to the bit.


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("hook", [EMA, EXP], ids=lambda hook: hook[0])
def test_hundreds_of_iterations_are_equal_to_the_bit(
    hook: tuple[str, dict[str, Any]],
    backend: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend is not None:
        monkeypatch.setenv("EMA_FUSED_BACKEND", backend)
    ours, theirs = run_both(*hook, epochs=38, work_dir=tmp_path)
    stale = hook is EXP
    assert_same(ours, theirs, stale_integers=stale)
    for epoch in (1, 19, 38):
        our, their = (tmp_path / side / f"epoch_{epoch}.pth" for side in ("ours", "theirs"))
        assert_same_checkpoints(our, their, stale_integers=stale)


@pytest.mark.parametrize("wrap", [None, mmcv_parallel.MMDataParallel], ids=["bare", "wrapped"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", ["epoch", "iter"])
@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_in_either_runner_is_equal_to_the_bit(
    hook: str, kind: str, interval: int, wrap: Callable[[nn.Module], nn.Module] | None
) -> None:
    name, arguments = HOOKS[hook]
    arguments = {**arguments, "interval": interval}
    ours, theirs = run_both(name, arguments, kind=kind, wrap=wrap, epochs=2)
    assert_same(ours, theirs, stale_integers=hook in BUFFERS_TOO)
    assert ours.of("evaluated")
    # The runner by iterations never puts the averages in.
    raw, evaluated = ours.of("trained")[BATCHES - 1], ours.of("evaluated")[0]
    assert ("conv.weight" in differences(raw, evaluated)) == (kind == "epoch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_equal_to_the_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMA_FUSED_BACKEND", raising=False)  # a pinned kernel has its own 16 bits
    arguments = {"momentum": 0.1, "interval": 3}
    ours, theirs = run_both("BaseEMAHook", arguments, model=lambda: net(dtype))
    assert_same(ours, theirs, stale_integers=True)


def test_a_distributed_training_is_equal_to_the_bit(tmp_path: Path) -> None:
    jobs = [
        {"side": side, "name": "BaseEMAHook", "arguments": {"momentum": 0.1}, "distributed": True}
        for side in ("ours", "theirs")
    ]
    in_new_processes(
        [{**job, "save": str(tmp_path / job["side"])} for job in jobs], tmp_path, processes=2
    )
    for rank in range(2):
        ours, theirs = load(tmp_path / f"ours{rank}"), load(tmp_path / f"theirs{rank}")
        assert_same(ours, theirs, stale_integers=True)
    ranks = [load(tmp_path / f"ours{rank}").of("trained")[-1] for rank in range(2)]
    # Each process has seen other samples, and all have one model.
    assert "loss" in differences(*ranks)
    assert "ema_conv_weight" not in differences(*ranks)


RESUMED = {
    "epoch-mmcv": ("epoch", "epoch_{}.pth", EMA[0], {**EMA[1], "interval": 3}),
    "epoch-exp": ("epoch", "epoch_{}.pth", *EXP),
    "iter-exp": ("iter", "iter_{}.pth", *EXP),
}
FROM_TO = [("ours", "ours"), ("theirs", "ours"), ("ours", "theirs"), ("theirs", "theirs")]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of trainings that went through, and of such that a new process took up halfway."""
    folder = tmp_path_factory.mktemp("resumed")
    jobs = []
    for case, (kind, checkpoint, name, arguments) in RESUMED.items():
        training = {"kind": kind, "epochs": 4}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            both = run_both(name, arguments, work_dir=folder / case, **training)
        halfway = checkpoint.format(2 if kind == "epoch" else 2 * BATCHES)
        for side, done in zip(("ours", "theirs"), both, strict=True):
            torch.save([tuple(moment) for moment in done.moments], folder / f"{case}-{side}")
        for source, side in FROM_TO:
            from_there = {**arguments, "resume_from": str(folder / case / source / halfway)}
            target = folder / f"{case}-{source}-{side}"
            job = {"side": side, "name": name, "arguments": from_there, **training}
            jobs.append({**job, "save": str(target), "work_dir": f"{target}-checkpoints"})
    in_new_processes(jobs, folder)
    return folder


@pytest.mark.parametrize(("source", "side"), FROM_TO[:3])
@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_goes_on_in_a_new_process_to_the_bit(
    case: str, source: str, side: str, resumed: Path
) -> None:
    found, expected = resumed / f"{case}-{source}-{side}", resumed / f"{case}-theirs-theirs"
    end = RESUMED[case][1].format(4 if "epoch" in case else 4 * BATCHES)
    stale = "exp" in case
    assert_same(load(found), load(expected), stale_integers=stale)
    assert_same_checkpoints(
        Path(f"{found}-checkpoints", end),
        Path(f"{expected}-checkpoints", end),
        stale_integers=stale,
    )


@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize("case", ["epoch-mmcv", "epoch-exp"])
def test_a_training_taken_up_is_as_one_that_went_through(
    case: str, side: str, resumed: Path
) -> None:
    """To the bit, integers included. By iterations mmcv itself does the last one again."""
    through, again = load(resumed / f"{case}-{side}"), load(resumed / f"{case}-{side}-{side}")
    assert again.moments[0][:2] == ("trained", 2 * BATCHES)
    half = len(through.moments) // 2
    assert_same(again, through._replace(moments=through.moments[half:]))
    end = "epoch_4.pth"
    assert_same_checkpoints(
        resumed / f"{case}-{side}-{side}-checkpoints" / end, resumed / case / side / end
    )


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("hook", HOOKS)
def test_momenta_and_names_are_the_originals(hook: str, interval: int) -> None:
    name, arguments = HOOKS[hook]
    our = getattr(OURS, name)(**arguments, interval=interval)
    their = getattr(THEIRS, name)(**arguments, interval=interval)
    assert (our.momentum, our.interval) == (their.momentum, their.interval)
    if hasattr(their, "get_momentum"):
        for iteration in range(100):
            at = type("Runner", (), {"iter": iteration})
            assert our.get_momentum(at) == their.get_momentum(at)
    run(our, epochs=1)
    run(their, epochs=1)
    assert our.param_ema_buffer == their.param_ema_buffer


def test_the_defaults_and_positional_arguments_are_the_originals() -> None:
    for name in ("EMAHook", "BaseEMAHook", "ExpMomentumEMAHook", "LinearMomentumEMAHook"):
        positional = {"EMAHook": (0.1, 3, 7), "BaseEMAHook": (0.1, 3, True, "path")}
        for arguments in ((), positional.get(name, (50,))):
            our, their = (getattr(side, name)(*arguments) for side in (OURS, THEIRS))
            expected = {key: value for key, value in vars(their).items() if not callable(value)}
            assert {key: vars(our)[key] for key in expected} == expected


# Registering.


@pytest.mark.parametrize("name", ["EMAHook", "ExpMomentumEMAHook", "LinearMomentumEMAHook"])
def test_ours_and_the_originals_are_registered_side_by_side(name: str) -> None:
    build = mmcv_runner.EpochBasedRunner.register_hook_from_cfg
    both: list[Any] = []
    collector = type("Runner", (), {"register_hook": lambda _, hook, priority: both.append(hook)})
    for registered in (name, f"Fused{name}"):
        build(collector(), {"type": registered, "momentum": 0.1, "priority": 49})
    assert [type(hook) for hook in both] == [getattr(THEIRS, name), getattr(OURS, name)]
    assert_same(run(both[1]), run(both[0]), stale_integers=True)


def test_ours_take_the_originals_names_when_told_to() -> None:
    code = """
import sys
from tests.frameworks.hooks.mmcv_runs import OURS, THEIRS, mmcv_runner
assert "mmengine" not in sys.modules
names = ["EMAHook", "ExpMomentumEMAHook", "LinearMomentumEMAHook"]
assert [mmcv_runner.HOOKS.get(name) for name in names] == [vars(THEIRS)[name] for name in names]
OURS.register(replace=True)
for name in names:
    assert mmcv_runner.HOOKS.get(name) is vars(OURS)[name]
    assert mmcv_runner.HOOKS.get(f"Fused{name}") is vars(OURS)[name]
"""
    processes.run("-c", code)


@pytest.mark.parametrize("mmcv", ["missing", "of version 2"])
def test_without_mmcv_1_the_error_says_what_to_install(mmcv: str, tmp_path: Path) -> None:
    (tmp_path / "mmcv").mkdir()
    what = "raise ImportError('no mmcv')" if mmcv == "missing" else "__version__ = '2.1.0'"
    (tmp_path / "mmcv" / "__init__.py").write_text(what, encoding="utf-8")
    code = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for module in ("mmcv", "mmselfsup"):
    try:
        importlib.import_module(f"ema_fused.hooks.{module}")
    except ImportError as error:
        assert "mmcv 1.x can't be imported" in str(error)
        assert "pip install 'ema_fused[mmcv]'" in str(error)
    else:
        raise AssertionError(module)
"""
    processes.run("-c", code, tmp_path)
