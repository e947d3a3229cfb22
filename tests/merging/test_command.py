"""``python -m ema_fused merge``, and the benchmark of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import merging as benchmark
from ema_fused import cli
from ema_fused.merging import open_checkpoint
from ema_fused.merging.command import dtype, size, split_weights
from tests import processes
from tests.merging.checkpoint_files import save, state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (100, 200, 300):
        save(state(step), folder / f"step-{step}.safetensors", "safetensors")
    return folder


def merge(*arguments: object) -> int:
    return cli.main(["merge", *map(str, arguments)])


def test_it_prints_the_weights_and_hashes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run.parent / "o.safetensors"
    assert merge(run, "-o", output, "--schedule", "minus-sqrt", "--last", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["+0.707107", "+0.292893"]
    assert [line.split()[2] for line in lines[:2]] == [
        str(run / f"step-{step}.safetensors") for step in (200, 300)
    ]
    assert all(len(line.split()[1]) == 8 for line in lines[:2])
    bytes_written = sum(tensor.nbytes for tensor in state(1).values())
    assert lines[2:] == [
        f"{output}: {bytes_written:,} bytes from 2 checkpoints by minus-sqrt, weights sum to 1"
    ]


def test_weights_are_given_with_the_paths(run: Path) -> None:
    one, other = (run / f"step-{step}.safetensors" for step in (100, 200))
    assert merge(f"{one}:3", f"{other}:1", "-o", run.parent / "o.safetensors", "--float64") == 0
    found = load_file(run.parent / "o.safetensors")["layer.weight"]
    expected = 0.75 * state(100)["layer.weight"] + 0.25 * state(200)["layer.weight"]
    torch.testing.assert_close(found, expected)


def test_every_option_reaches_the_merge(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run.parent / "out"
    options = (
        "--format distributed --ignore double --dtype bfloat16 --rounding stochastic --seed 3 "
        "--integers equal --memory 3GiB --hash sha256 --steps 1 2 --schedule power:0.1 --every 2 "
        "--only-common --allow-nonfinite --no-normalise"
    )
    assert merge(run, "-o", output, *options.split()) == 0
    told = capsys.readouterr().out
    assert "left out: double" in told and "2 checkpoints by power:0.1" in told
    found = open_checkpoint(output)
    assert found.contents.format == "distributed" and "double" not in found.tensors
    assert found.tensors["layer.weight"].dtype == torch.bfloat16
    assert json.loads((output / "merge.json").read_text())["hash"] == "sha256"
    assert merge(run, "-o", run.parent / "s", "--max-shard-size", "500") == 0
    assert len(list((run.parent / "s").glob("*.safetensors"))) > 2
    nested = save(state(1), run.parent / "n.pt", "nested", ema=state(2))
    assert merge(nested, "-o", run.parent / "k.pt", "--key", "ema") == 0
    assert open_checkpoint(run.parent / "k.pt").key == "ema"


def test_errors_and_warnings_are_lines(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run / "step-100.safetensors"
    assert merge(f"{one}:0.5", one, "-o", run.parent / "o.pt") == 1
    assert capsys.readouterr().err.startswith("error: 1 of 2 checkpoints have a weight")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert merge(one, one, "-o", run.parent / "o.pt") == 0
    assert (
        capsys.readouterr().err == f"warning: given more than once, with as many weights: {one}\n"
    )
    monkeypatch.setattr("ema_fused.merging.command.merge", _interrupted)
    assert merge(one, "-o", run.parent / "o.pt") == 130
    assert capsys.readouterr().err == "interrupted\n"


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_paths_with_colons_are_paths_if_they_exist(tmp_path: Path) -> None:
    odd = tmp_path / "a:1"
    odd.touch()
    assert split_weights([str(odd)]) == ([str(odd)], None)
    assert split_weights([f"{odd}:2", "b:.5"]) == ([str(odd), "b"], [2.0, 0.5])
    assert split_weights(["C:weights", "d"]) == (["C:weights", "d"], None)


@pytest.mark.parametrize(
    ("text", "bytes_meant"),
    [("2GiB", 2**31), ("1.5kB", 1500), ("7", 7), ("3 MB", 3 * 10**6), ("1T", 10**12)],
)
def test_sizes(text: str, bytes_meant: int) -> None:
    assert size(text) == bytes_meant


def test_what_is_no_size_or_dtype_is_refused() -> None:
    for text in ("", "2 apples", "-3", "GiB"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
            size(text)
    for text in ("int8", "nothing", "load"):
        with pytest.raises(argparse.ArgumentTypeError, match="no floating-point dtype"):
            dtype(text)


# One program of its own: what is resident in this one would count.
_PEAK = """
import sys
from ema_fused.merging import merge
from ema_fused.merging.resident import peak_bytes, resident_bytes
before = resident_bytes()
merge(sys.argv[1:-1], output=sys.argv[-1], memory=before + (100 << 20))
print(peak_bytes() - before)
"""


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    size_of_one = 64 << 20
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.pt")
        torch.save({"w": torch.full((size_of_one // 4,), float(number))}, paths[-1])
    done = processes.run("-c", _PEAK, *paths, tmp_path / "o.pt")
    assert int(done.stdout) < 100 << 20 < 4 * size_of_one
    assert open_checkpoint(tmp_path / "o.pt").tensors["w"].tensor().unique().tolist() == [1.5]


def test_the_benchmark_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- merging.py: begin -->\n<!-- merging.py: end -->\n")
    arguments = ["--gigabytes", "0.001", "--formats", "sharded", "--repeats", "1"]
    report = tmp_path / "report.json"
    folder = ["--folder", str(tmp_path), "--json", str(report), "--write", str(page)]
    benchmark.main([*arguments, *folder])
    rows = json.loads(report.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["ema_fused", "reading and writing", "loop"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert page.read_text().count("| sharded |") == 3


@pytest.mark.parametrize("format", benchmark.FORMATS)
def test_the_benchmark_s_files_are_checkpoints(tmp_path: Path, format: str) -> None:
    paths = benchmark.make(tmp_path, 10**6, format, torch.bfloat16)
    size_of_all = sum(open_checkpoint(path).bytes for path in paths)
    assert size_of_all > 10**6 / 2
    output = tmp_path / "out.safetensors"
    benchmark.merge(paths, output)
    if benchmark.can("loop", format):
        benchmark.loop(paths, tmp_path / "loop.safetensors")
        for name, tensor in load_file(tmp_path / "loop.safetensors").items():
            torch.testing.assert_close(load_file(output)[name], tensor, rtol=0.01, atol=0.01)
