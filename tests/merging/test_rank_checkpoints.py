"""Checkpoints that several ranks have written are read as the whole tensors that they are of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ema_fused import cli
from ema_fused.converting import convert, inspect, read_average
from ema_fused.converting.average_state import whole
from ema_fused.merging import distributed_layout, merge, open_checkpoint
from ema_fused.merging.choosing import step_of
from tests.merging import rank_writing
from tests.merging.rank_writing import SEEDS, WAYS, net
from tests.ranks import Ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*statistics of batch norm", "ignore:given more than once"
)

DTYPES = [torch.float32, torch.bfloat16]
WEIGHTS = [0.25, 0.25, 0.5]  # exact, so that a sum in float64 is rounded once: at its end


@dataclass
class Written:
    """What two and four ranks have written.

    Attributes:
        averages: the whole averages by the name of the folder, as the ranks gathered them.
    """

    two: Path
    four: Path
    averages: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def written(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks.run(rank_writing.everything, folder / "two", DTYPES)
    averages = four_ranks.run(rank_writing.everything, folder / "four", DTYPES)[0]
    return Written(folder / "two", folder / "four", averages)


def tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    found = open_checkpoint(path, key)
    read = {name: one.tensor() for name, one in found.tensors.items()}
    return read | {name: read[kept] for name, kept in found.tied.items()}


def assert_same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(read[name], tensor), name


def summed(dtype: torch.dtype) -> dict[str, Tensor]:
    """The weighted sums of the whole tensors by NumPy, in float64."""
    states = [net(seed, dtype).state_dict() for seed in SEEDS]
    sums = {}
    for name, last in states[-1].items():
        values = [state[name].double().numpy() for state in states]
        total = sum(w * one for w, one in zip(WEIGHTS, values, strict=True))
        sums[name] = torch.from_numpy(np.asarray(total)).to(last.dtype)
    return sums


every = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@every
def test_shards_are_whole_tensors_again_and_their_sums_exact(
    written: Written, tmp_path: Path, dtype: torch.dtype, four_ranks: Ranks
) -> None:
    end = str(dtype).removeprefix("torch.")
    expected = summed(dtype)
    folders = [written.four / f"{way}-{end}" for way in WAYS]
    for folder in [*folders, written.two / f"fsdp2-{end}"]:
        steps = [folder / f"step-{100 * seed}" for seed in SEEDS]
        for seed, path in zip(SEEDS, steps, strict=True):
            assert_same(tensors(path), net(seed, dtype).state_dict())
            for name, one in open_checkpoint(path).tensors.items():
                pieces = list(one.pieces(32))
                flat = net(seed, dtype).state_dict()[name].flatten()
                assert torch.equal(torch.cat(pieces) if pieces else flat[:0], flat), name
        out = tmp_path / folder.parent.name / f"{folder.name}.safetensors"
        out.parent.mkdir(exist_ok=True)
        merge(steps, WEIGHTS, output=out, float64=True, format="safetensors")
        assert_same(load_file(out), expected)
    # Those of one run need not have been spread in the same way.
    mixed = [written.two / f"fsdp2-{end}", folders[-1], folders[-2]]
    steps = [folder / f"step-{100 * seed}" for folder, seed in zip(mixed, SEEDS, strict=True)]
    merge(steps, WEIGHTS, output=tmp_path / "mixed", float64=True)
    assert open_checkpoint(tmp_path / "mixed").contents.format == "distributed"
    assert_same(tensors(tmp_path / "mixed"), expected)
    for read in four_ranks.run(rank_writing.loaded, tmp_path / "mixed", "two_dimensions", dtype):
        assert_same(read, expected)


def test_the_command_averages_a_run_of_four_ranks(written: Written, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for seed in SEEDS:
        name = f"step-{100 * seed}"
        shutil.copytree(written.four / "two_dimensions-bfloat16" / name, run / name)
    assert cli.main(["merge", str(run), "--last", "2", "-o", str(tmp_path / "out.pt")]) == 0
    found = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    last = [net(seed, torch.bfloat16).state_dict() for seed in SEEDS[1:]]
    for name, tensor in found.items():
        if tensor.is_floating_point():
            mean = (last[0][name].double().numpy() + last[1][name].double().numpy()) / 2
            assert torch.equal(tensor, torch.from_numpy(np.asarray(mean)).to(tensor.dtype)), name


def test_averages_of_shards_are_converted_and_come_back_to_the_bit(
    written: Written, tmp_path: Path
) -> None:
    for folder in (f"{way}-bfloat16" for way in WAYS):
        ours, expected = written.four / folder / "ours", written.averages[folder]
        for path in (ours / "both", ours / "checkpoint-2" / "averaged" / "shards"):
            state = read_average(path)
            assert (state.format, state.key, state.steps) == ("ema_fused", "averaged", 2)
            assert_same({name: whole(one) for name, one in state.averaged.items()}, expected)
            out = tmp_path / f"{folder}-{path.name}"
            convert(path, "ema_fused", out.with_suffix(".safetensors"))
            convert(out.with_suffix(".safetensors"), "ema_fused", out)  # a folder again
            convert(out, "torch", out.with_suffix(".pt"))
            for form in (out.with_suffix(".safetensors"), out, out.with_suffix(".pt")):
                back = read_average(form)
                assert back.steps == 2
                assert_same({name: whole(one) for name, one in back.averaged.items()}, expected)
        raw = read_average(ours / "both").raw
        assert raw is not None
        plain = {name: whole(one) for name, one in raw.items()}
        assert_same(plain, net(2, torch.bfloat16).state_dict())


@every
def test_inspect_sees_whole_tensors_and_distances(
    written: Written, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"two_dimensions-{str(dtype).removeprefix('torch.')}"
    path = written.four / folder / "ours" / "both"
    expected, raw = written.averages[folder], net(2, dtype).state_dict()
    found = inspect(path)
    assert (found.format, found.state.steps) == ("ema_fused", 2)
    assert found.elements == sum(tensor.numel() for tensor in expected.values())
    assert {one.name: one.elements for one in found.tensors} == {
        name: tensor.numel() for name, tensor in expected.items()
    }
    assert not found.only_here and not found.only_there
    for layer in found.layers:
        names = [name for name in expected if (name.rpartition(".")[0] or name) == layer.name]
        apart = [
            expected[name].double().numpy() - raw[name].double().numpy()
            for name in names
            if expected[name].is_floating_point()
        ]
        distance = np.sqrt(sum(np.square(one).sum() for one in apart))
        assert layer.distance == pytest.approx(distance, rel=1e-6), layer.name
    # Copied buffers; their averages may be wider than they.
    assert found.never_updated == ["norm.running_mean", "norm.running_var"]
    assert cli.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"elements       {found.elements:,}" in printed and "uneven" in printed
    steps = [written.four / folder / f"step-{100 * seed}" for seed in SEEDS]
    between = inspect(steps[0], steps[1])
    first = net(1, dtype).state_dict()
    squares = [
        np.square(first[name].double().numpy() - raw[name].double().numpy()).sum()
        for name in raw
        if raw[name].is_floating_point()
    ]
    assert between.total.distance == pytest.approx(np.sqrt(sum(squares)), rel=1e-6)


def test_weights_are_read_beside_objects_that_only_code_could_make(
    written: Written, tmp_path: Path
) -> None:
    training = written.four / "training"
    found = open_checkpoint(training)
    assert found.key == "app.model"
    assert_same(tensors(training), net(1, torch.float32).state_dict())
    merge([training, training], output=tmp_path / "out.safetensors", format="safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), net(1, torch.float32).state_dict())
    with pytest.raises(ValueError, match=r"without running code.*pathlib"):
        open_checkpoint(training, "")  # in which such an object stands beside tensors


def test_states_of_optimizers_are_read_if_they_are_asked_for(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    own = distributed_layout.load_layout

    def counted(*given: Any) -> Any:
        read.append(given)
        return own(*given)

    monkeypatch.setattr(distributed_layout, "load_layout", counted)
    weights = open_checkpoint(written.four / "training")
    # ... and the objects beside them: of random numbers, data, and a path.
    assert len(read) == sum(len(one.boxes) for one in weights.tensors.values()) + 4
    found = open_checkpoint(written.four / "training", "app.optim.state.kernel")
    assert found.tensors["exp_avg"].tensor().shape == (5, 4, 3)


def test_flat_pieces_are_put_together(written: Written) -> None:
    parameters = {name: one.detach() for name, one in net(1, torch.float32).named_parameters()}
    assert len(open_checkpoint(written.four / "flat").tensors["kernel"].boxes) > 4
    assert_same(tensors(written.four / "flat"), parameters)


def test_safetensors_of_ranks_are_one_checkpoint_and_no_run(
    written: Written, tmp_path: Path
) -> None:
    steps = [written.four / "ranks" / f"step-{seed}" for seed in SEEDS]
    for seed, path in zip(SEEDS, steps, strict=True):
        assert_same(tensors(path), net(seed, torch.float32).state_dict())
    merge(steps, WEIGHTS, output=tmp_path / "out", float64=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "merge.json",
        "model.safetensors",
    ]
    assert_same(tensors(tmp_path / "out"), summed(torch.float32))
    # The result doesn't say that it is in parts.
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b"DCP_SHARDING_INFO" not in header
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert len(record["inputs"]) == len(SEEDS)


def test_parts_of_a_checkpoint_are_never_averaged_with_each_other(
    written: Written, tmp_path: Path
) -> None:
    ranks = written.four / "ranks" / "step-1"
    files = sorted(ranks.iterdir())
    assert len(files) == 4
    with pytest.raises(ValueError, match="has the parts of one rank"):
        open_checkpoint(files[0])
    for left in ([0, 2, 3], [0, 1, 2], [1]):
        folder = tmp_path / "".join(map(str, left))
        folder.mkdir()
        for number in left:
            shutil.copy(files[number], folder)
        with pytest.raises(ValueError, match="copy the files of all ranks"):
            merge(folder, output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds tensors of torch\.distributed\.tensor"):
        open_checkpoint(written.four / "saved" / "rank_1.pt")
    with pytest.raises(ValueError, match=r"holds rank_\*\.pt, which by their names are parts"):
        merge(written.four / "saved", output=tmp_path / "out")
    for name in ("mp_rank_0{}", "consolidated.0{}.pth", "model-0000{}-of-00002.bin"):
        folder = tmp_path / name.format("x")
        for number in (1, 2):
            path = folder / name.format(number)
            path = path if path.suffix else path / "model.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"w": torch.full((2,), float(number))}, path)
        with pytest.raises(ValueError, match="are parts of one checkpoint"):
            merge(folder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for number in (1, 2):  # those of a run may be counted too
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / f"epoch-{number}-of-2.pt")
    for folder in tmp_path.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    merge(tmp_path, output=tmp_path / "mean.safetensors")
    assert load_file(tmp_path / "mean.safetensors")["w"].tolist() == [1.5, 1.5]


def test_steps_and_folders_of_a_trainer_are_found(written: Written, tmp_path: Path) -> None:
    weights = []
    for seed in SEEDS:
        checkpoint = tmp_path / f"checkpoint-{seed}0"
        weights.append(checkpoint / "pytorch_model_fsdp_0")
        shutil.copytree(written.four / "ranks" / f"step-{seed}", weights[-1])
        shutil.copytree(written.four / "training", checkpoint / "optimizer_0")
        for name in ("scheduler.pt", "rng_state_0.pth"):
            torch.save({}, checkpoint / name)
    steps = [step_of(open_checkpoint(path)) for path in weights]
    assert steps == [10, 20, 30]
    shutil.rmtree(weights[0])
    with pytest.raises(ValueError, match=r"in folders \(optimizer_0\); pass one of them"):
        open_checkpoint(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("kind", ["saved", "pieces"])
def test_a_shard_is_named_where_nothing_has_imported_its_class(written: Written, kind: str) -> None:
    path = written.four / kind / "rank_0.pt"
    done = subprocess.run(
        [sys.executable, "-m", "ema_fused", "inspect", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "holds tensors of" in done.stderr and "one rank's shard alone" in done.stderr
