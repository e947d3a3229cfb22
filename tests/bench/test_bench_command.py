"""``python -m ema_fused bench``, on tiny tensors. No test here looks at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import cli
from ema_fused.bench import cases, short, tables
from ema_fused.bench.timing import NO_EFFORT, CpuClock

MODULE = """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4).bfloat16(), Norm())

made = nn.Linear(2, 2)
number = 3

def nothing():
    return None

def failing():
    raise OSError("no weights found")

def mixed():
    model = nn.Linear(2, 2)
    model.whole = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    model.waves = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
    return model

def empty():
    return nn.Sequential()

def elsewhere():
    return nn.Linear(2, 2, device="meta")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of a user's, in the folder that the command is typed in."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(short.sys, "path", list(short.sys.path))
    return name


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "_SHAPES", ("3x2",))
    monkeypatch.setattr(short.bench, "__defaults__", (None, None, None, NO_EFFORT))


def test_standard_shapes_beside_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    assert cli.main(["bench", "--device", "cpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["failed"] == []
    found = [(case["kind"], case["dtypes"]) for case in report["cases"]]
    assert found == [
        ("lists", "float32"),
        ("lists", "bfloat16 into float32"),
        ("several", "float32"),
        ("models", "float32"),
    ]
    for name in ("torch._foreach_lerp_", "torch AveragedModel, foreach"):
        assert f"| {name} | " in printed
    assert f"torch {torch.__version__}" in printed


def test_a_model_of_ones_own_is_measured_dtype_by_dtype(
    own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    arguments = ["bench", "--model", f"{own}:build", "--device", "cpu", "--json", str(file)]
    assert cli.main(arguments) == 0, capsys.readouterr().out
    report = json.loads(file.read_text(encoding="utf-8"))
    found = [(case["kind"], case["dtypes"], case["elements"]) for case in report["cases"]]
    assert found == [
        ("lists", "bfloat16", 16),
        ("lists", "bfloat16 into float32", 16),
        ("lists", "float32", 4),
        ("models", "bfloat16 and float32", 20),
    ]
    assert f"| {own}:build | " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")  # complex, beside x86-64
def test_parameters_that_are_not_averaged_do_no_harm(own: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    arguments = ["bench", "--model", f"{own}:mixed", "--device", "cpu", "--json", str(file)]
    assert cli.main(arguments) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [case["elements"] for case in report["cases"]] == [6, 6]


def test_what_runs_on_foreach_is_not_measured_as_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMA_FUSED_BACKEND", "foreach")
    assert cli.main(["bench", "--device", "cpu"]) == 1
    wanted = "nothing of ours would be measured on cpu, because EMA_FUSED_BACKEND pins foreach"
    assert wanted in capsys.readouterr().err


def test_a_model_that_is_there_already_is_not_changed(own: str) -> None:
    model = short.own_model(f"{own}:made", torch.device("cpu"))
    assert isinstance(model, nn.Linear)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for case in cases.own_model_cases(model, "made", CpuClock()):
        with torch.no_grad():
            case.make().check()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("build", "it is package.module:name"),
        ("{own}:", "it is package.module:name"),
        ("{own}:absent", "has no absent"),
        ("{own}:number", "gave int and not a torch.nn.Module"),
        ("{own}:nothing", "gave NoneType and not a torch.nn.Module"),
        ("{own}:failing", "calling it without arguments failed: OSError: no weights found"),
        ("{own}:Norm.forward", "has no Norm.forward"),
        ("{own}:empty", "has no floating-point parameter"),
        ("{own}:elsewhere", "weight is on meta and the benchmark runs on cpu"),
        ("no_such_module:build", "No module named 'no_such_module'"),
    ],
)
def test_a_name_that_gives_no_model_is_told(
    own: str, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--device", "cpu", "--model", name.format(own=own)]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.out == ""


def test_cuda_where_there_is_none_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(short, "why_no_gpu", lambda: "torch sees no CUDA device")
    assert cli.main(["bench", "--device", "cuda"]) == 1
    assert "nothing can be measured on CUDA: torch sees no CUDA device" in capsys.readouterr().err


def test_a_wrong_result_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(buffers: Any) -> None:
        torch._foreach_lerp_(buffers.averaged, buffers.source, 0.01)

    monkeypatch.setattr("ema_fused.bench.contenders.foreach", wrong)
    assert cli.main(["bench", "--device", "cpu"]) == 1
    assert "torch._foreach_lerp_ differs from torch at tensor 0" in capsys.readouterr().out


def test_a_busy_machine_is_said() -> None:
    environment = {"device": "a CPU", "cores": 2, "command": "python", "load": 1.1}
    assert "load 1.1 on 2 cores" in tables.about({"environment": environment})
    for load in ({"load": 0.9}, {"load": 1.0}):
        assert "busy" not in tables.about({"environment": {**environment, **load}})


def test_small_ratios_and_long_times_keep_two_digits() -> None:
    timing = {"median": 1.234, "lower_quartile": 1.2, "upper_quartile": 1.3}
    assert tables.cell({"ratio": 0.00164, "timing": timing}) == "0.0016 (1.23 s ±4%)"


def test_a_terminal_gets_the_same_cells_from_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    table = tables.Table("A title", ["", "ResNet-50"], [["foreach", "1.25 (3 ms)"]], "a note")
    written: list[str] = []
    tables.show([table], written.append)
    printed = capsys.readouterr().out
    assert written == [] and "1.25 (3 ms)" in printed and "A title" in printed


def test_busy_measures_ours_and_foreach_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def bench(*arguments: object, **options: object) -> int:
        asked.update(options, arguments=arguments)
        return 0

    monkeypatch.setattr(short, "bench", bench)
    assert cli.main(["bench", "--busy"]) == 0
    assert asked == {"busy": True, "arguments": (None, None, None)}
