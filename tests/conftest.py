"""Which backends a test runs over, and when a GPU test is skipped or rehearsed."""

from __future__ import annotations

import gc
import importlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from ema_fused.engine import backends
from tests import device, ranks
from tests.ranks import Ranks
from tests.threads import on_threads

# A run in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_NO_GPU = pytest.mark.skip(
    reason="needs a CUDA device, and torch sees none; --rehearse runs it on the CPU"
)
# On the CPU there is nothing to overlap with, and that is said each time.
_ON_CPU = pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
_GPU_TEST = ("gpu test", "")  # tells the report of such a test from others

# The same examples in every run, and as much time for each as a busy machine takes.
settings.register_profile(
    "ema_fused",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ema_fused")


# The processes that run tests side by side share the cores. Tests of threads set their own number.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _WORKERS))

_TRAINERS_ON_GPUS = (
    "tests/gpu/test_gpu_deepspeed.py",
    "tests/gpu/test_gpu_lightning.py",
    "tests/gpu/test_gpu_transformers.py",
)
# A file's tests share fixtures, so one process runs them all, and one process runs all the files
# that start distributed processes: several such groups at a time would disturb each other.
_START_RANKS = (
    *_TRAINERS_ON_GPUS,
    "tests/converting/test_sharded_averages.py",
    "tests/merging/test_rank_checkpoints.py",
    "tests/modules/test_sharded.py",
    "tests/modules/test_sharded_left_out.py",
    "tests/modules/test_gathering_ways.py",
    "tests/modules/test_sharded_refusals.py",
    "tests/modules/test_sharded_sources.py",
    "tests/modules/test_sharded_states.py",
    "tests/project/test_ranks.py",
    "tests/saving/test_export.py",
    "tests/saving/test_killed_saves.py",
    "tests/saving/test_load_or_start.py",
    "tests/saving/test_replicas.py",
    "tests/averages/test_bias_corrected.py",
    "tests/averages/test_latest_weights_sharded.py",
    "tests/averages/test_nonfinite_steps.py",
    "tests/bench/test_sharded_step.py",
    "tests/frameworks/adapters/test_torchtitan_ranks.py",
    "tests/examples/test_example_fsdp2.py",
    "tests/frameworks/test_zero3.py",
    "tests/frameworks/test_zero3_bema.py",
    "tests/frameworks/test_zero3_engines.py",
    "tests/frameworks/test_zero3_states.py",
    "tests/frameworks/test_zero3_universal.py",
    "tests/frameworks/callbacks/test_callback_lightning_sharded.py",
    "tests/frameworks/callbacks/test_callback_lightning_killed.py",
    "tests/frameworks/callbacks/test_callback_lightning_gathering.py",
    "tests/frameworks/callbacks/test_callback_trl_zero3.py",
    "tests/frameworks/callbacks/test_callback_accelerate_sharded.py",
    "tests/frameworks/callbacks/test_callback_huggingface_sharded.py",
    "tests/frameworks/callbacks/test_callback_huggingface_sharded_kinds.py",
)
_RANKS = {"two_ranks", "four_ranks", "deepspeed_ranks", "two_trainers", "four_trainers"}
# What takes longest is begun first, so that no process is left alone with it at the end.
_FIRST = (
    "tests/project/test_build.py",
    *_START_RANKS,
    "tests/documentation/test_docs.py",
    "tests/bench/test_benchmarks.py",
    "tests/examples/test_example_mmengine.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse",
        action="store_true",
        help="where torch sees no GPU, run GPU tests on CPU tensors, as far as these serve",
    )


def _is_rehearsal(config: pytest.Config) -> bool:
    return bool(config.getoption("rehearse")) and not torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    if _is_rehearsal(config):
        device.rehearse()


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing: a GPU is tested without it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Shares tests out among the processes by the file that they are in."""
    scheduling = importlib.import_module("xdist.scheduler").LoadScopeScheduling

    class ByFile(scheduling):  # type: ignore[misc, valid-type]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ranks" if file in _START_RANKS else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _RANKS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") is None:
            continue
        item.user_properties.append(_GPU_TEST)
        if _is_rehearsal(config):
            item.add_marker(_ON_CPU)
        elif not torch.cuda.is_available():
            item.add_marker(_NO_GPU)
    order = {file: place for place, file in enumerate(_FIRST)}
    if torch.cuda.is_available():  # whose time may be limited: the kernels come first
        order |= dict.fromkeys(_TRAINERS_ON_GPUS, len(_FIRST) + 1)
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(_FIRST)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tells how much of the GPU tests was rehearsed."""
    if not _is_rehearsal(config):
        return
    ended = {
        outcome: [
            report
            for report in terminalreporter.getreports(outcome)
            # A file that is skipped as a whole has no tests, and its report no properties.
            if _GPU_TEST in map(tuple, getattr(report, "user_properties", ()))
        ]
        for outcome in ("passed", "skipped", "failed", "error")
    }
    terminalreporter.section("rehearsal of the GPU tests")
    terminalreporter.write_line(device.told(ended))


def pytest_collection_finish() -> None:
    """Sets aside what was imported and collected: collecting garbage in tests then takes no time.

    A full collection walks hundreds of thousands of objects otherwise.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", "foreach"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that serves CPU tensors."""
    name: str = request.param
    reason = backends.why_not(name)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that tests start: sums are split among threads, and rounded accordingly.

    Small networks are quicker so, too: their threads only wait for one another.
    """
    with on_threads(1):
        yield


# Ended with each file: a thread of each group that its tests have made wakes every 10 ms.
@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with ranks.started(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    with ranks.started(4) as processes:
        yield processes


@pytest.fixture(scope="session")
def deepspeed_ranks() -> Iterator[Ranks]:
    """Two processes into which DeepSpeed is imported, which other tests' don't get."""
    with ranks.started(2) as processes:
        yield processes
