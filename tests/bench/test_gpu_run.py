"""A run on a GPU, rehearsed: its cases, apex's among them, and what README shows of its file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import apex, marked, pages, records
from ema_fused.bench.contenders import FOREACH, OUR_LISTS, Group
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import CpuClock
from tests.bench import apex_stand_ins
from tests.bench.apex_stand_ins import install
from tests.threads import on_threads

SHAPES = Shapes("some", "some", [(5, 3), (), (4,)], "made up")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a rehearsal: all but what is compiled, which takes long."""
    file = tmp_path_factory.mktemp("rehearsal") / "rehearsal.json"
    with pytest.MonkeyPatch.context() as patch, on_threads(1):
        install(patch)
        arguments = ["--peers", "torch", "sharded", "apex", "step", "--dtypes", "float32", "mixed"]
        assert program.main(["--rehearse", *arguments, "--json", str(file)]) == 0
    yield file


def on_gpu(rehearsed: Path, folder: Path, **changes: Any) -> Path:
    """The same as if it came from a GPU."""
    report = records.read(rehearsed)
    report["environment"] |= {"device": "Some GPU", "capability": "9.0", "driver": "1.2"}
    report |= {"smoke": False, "rehearsal": False, "copy": {"bytes_per_second": [2e12, 3e12]}}
    for case in report["cases"]:
        for place, contender in enumerate(case["contenders"]):
            contender |= {"ratio": 1.0 + place, "limit_fraction": 0.9 / (1 + place)}
    file = folder / "gpu_some.json"
    records.write(file, report | changes)
    return file


# ---- The rehearsal -------------------------------------------------------------------------------


def test_a_rehearsal_runs_what_a_gpu_does_and_says_what_it_is(
    rehearsal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = records.read(rehearsal)
    assert report["rehearsal"] and report["smoke"]
    assert report["failed"] == []
    assert report["left_out"] == [{"case": "step", "reason": "measured on the CPU only"}]
    kinds = {case["kind"] for case in report["cases"]}
    assert kinds == {"host", "lists", "several", "models", "sharded", "apex"}
    assert {case["tensors"] for case in report["cases"]} >= {16, 161}
    assert program.main(["--rehearse", "--models", "3x2", "--peers", "sharded"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("**A rehearsal: tiny tensors on the CPU.")
    assert "not judged" in printed and "NOT MET" not in printed


def test_a_gpus_run_and_its_rehearsal_choose_alike() -> None:
    on_a_gpu, rehearsed = (program.options(o) for o in (["--device", "cuda"], ["--rehearse"]))
    assert on_a_gpu.peers == rehearsed.peers == ["torch", "compiled", "sharded", "apex"]
    assert set(rehearsed.models) < set(on_a_gpu.models)
    assert rehearsed.smoke and not on_a_gpu.smoke


# ---- README --------------------------------------------------------------------------------------


def test_a_run_on_a_gpu_becomes_a_table(rehearsal: Path, tmp_path: Path) -> None:
    part = pages.gpu_part([on_gpu(rehearsal, tmp_path)])
    assert part.startswith("How many times as long as ours others take for one update on Some GPU")
    assert "moves 3,000 GB/s" in part and "driver 1.2" in part
    assert "(benchmarks/results/gpu_some.json)" in part
    head, _, *rows = part.partition("\n\n")[2].splitlines()
    assert head.startswith("| | 16 x 16 777 216, tiny | ResNet-50, tiny | 20 x 16, tiny |")
    split = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    cells = {name: figures for name, *figures in split}
    assert cells["ours, of the copy's speed: float32"] == ["0.90", "0.90", ""]
    assert cells["`torch._foreach_lerp_`, float32 lists"] == ["3.0", "3.0", ""]
    assert cells["cast, then foreach: bfloat16 into float32"] == ["4.0", "4.0", ""]
    assert cells["foreach on DTensors"] == ["", "", "3.0"]
    assert cells["apex `multi_tensor_axpby`"] == ["", "", "3.0"]
    assert cells["apex `FusedAdamSWA`, beside Adam and ours"] == ["", "", "2.0"]
    assert not any("torch.compile" in name for name in cells)  # it wasn't measured
    failed = on_gpu(rehearsal, tmp_path, failed=[{"case": "one", "reason": "because"}])
    assert "; 1 of its cases failed." in pages.gpu_part([failed])


def test_a_rehearsal_is_never_shown_as_a_gpus(rehearsal: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rehearsal.json shows nothing of a GPU"):
        pages.gpu_part([rehearsal])
    for marks in ({"rehearsal": True}, {"smoke": True}, {"environment": {"device": "a CPU"}}):
        with pytest.raises(ValueError, match=r"gpu_some.json shows nothing of a GPU"):
            pages.gpu_part([on_gpu(rehearsal, tmp_path, **marks)])


def test_readme_shows_the_gpus_that_have_run() -> None:
    text = pages.README.read_text(encoding="utf-8")
    part = pages.gpu_part(pages.gpu_files())
    assert text == marked.between_markers(text, pages.ON_GPUS, part), "python -m benchmarks.pages"


# ---- apex ----------------------------------------------------------------------------------------


def groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    install(monkeypatch)
    return [case.make() for case in apex.apex_cases([SHAPES], CpuClock())]


@torch.no_grad()
def test_apexs_results_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, optimizers = groups(monkeypatch)
    assert [c.name for c in lists.contenders] == [OUR_LISTS, FOREACH, "apex multi_tensor_axpby"]
    assert [c.name for c in optimizers.contenders] == [apex.OUR_ADAM, "apex FusedAdamSWA"]
    for group in (lists, optimizers):
        group.check()
        group.check()
        (averages,) = group.contenders[-1].buffers
        right = group.contenders[-1].calls[0]
        group.contenders[-1].calls[0] = partial(averages.averaged[0].fill_, 7.0)
        with pytest.raises(AssertionError, match=r"differs from torch|not what torch's Adam"):
            group.check()
        group.contenders[-1].calls[0] = right


def test_apex_is_called_by_the_names_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk size, flag, lists in and out, both factors, no search for infinities."""
    found: list[Any] = []
    monkeypatch.setattr(apex_stand_ins, "multi_tensor_axpby", lambda *given: found.append(given))
    lists = groups(monkeypatch)[0]
    lists.contenders[-1].calls[0]()
    ((chunk, flag, (x, y, out), a, b, which),) = found
    assert (chunk, flag.dtype, which) == (65536, torch.int32, -1)
    assert x is out and x is not y
    assert a + b == 1.0 and b == 0.001


@pytest.mark.skipif("amp_C" in sys.modules, reason="apex is installed")
def test_a_missing_apex_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    file = tmp_path / "run.json"
    assert program.main(["--rehearse", "--peers", "apex", "--json", str(file)]) == 0
    (left,) = records.read(file)["left_out"]
    assert left["case"] == "apex" and left["reason"].startswith("it isn't installed: ")
    assert program.main(["--smoke", "--peers", "apex", "--json", str(file)]) == 0
    (left,) = records.read(file)["left_out"]
    assert left == {"case": "apex", "reason": "measured on the GPU only"}
