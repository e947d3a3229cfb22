"""What a merge writes: whole or not at all, in every format, with what belongs to it."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader

from ema_fused.merging import merge, open_checkpoint, weights_of
from ema_fused.merging.results import RECORD
from tests import processes
from tests.merging import kill_run
from tests.merging.checkpoint_files import FORMATS, OUTPUTS, open_files, save, state


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [save(state(seed), tmp_path / f"in-{seed}.pt", "torch") for seed in (1, 2, 3)]


def result(path: Path) -> dict[str, Tensor]:
    return {name: one.tensor() for name, one in open_checkpoint(path).tensors.items()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_format_becomes_every_format_to_the_bit(
    tmp_path: Path, inputs: list[Path], format: str, name: str
) -> None:
    merge(inputs, output=tmp_path / "expected.pt", schedule="ema:0.7")
    expected = result(tmp_path / "expected.pt")
    paths = [save(state(seed), tmp_path / f"{seed}", format) for seed in (1, 2, 3)]
    record = merge(paths, output=tmp_path / name, schedule="ema:0.7", format=OUTPUTS[name])
    found = result(tmp_path / name)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert record.bytes == sum(tensor.nbytes for tensor in expected.values())


def test_the_files_are_read_by_those_who_own_the_formats(
    tmp_path: Path, inputs: list[Path]
) -> None:
    for name, format in OUTPUTS.items():
        merge(inputs, output=tmp_path / name, format=format)
    expected = result(tmp_path / "out.pt")
    by_torch = torch.load(tmp_path / "out.pt", weights_only=True)
    by_map = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    by_safetensors = load_file(tmp_path / "out.safetensors")
    in_folder = load_file(tmp_path / "folder" / "model.safetensors")
    by_parts = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(by_parts, checkpoint_id=tmp_path / "distributed", no_dist=True)
    for found in (by_torch, by_map, by_safetensors, in_folder, by_parts):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_parts_smaller_than_a_tensor_make_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... and a tensor in several parts is in as many chunks of a distributed checkpoint."""
    shapes = {"w": (1, 900, 7), "transposed": (50, 40), "flat": (5000,)}
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        tensors["transposed"] = tensors["transposed"].t()
        paths.append(save(tensors, tmp_path / f"{seed}.pt", "torch"))
    merge(paths, output=tmp_path / "whole.pt")
    from ema_fused.merging import streaming

    monkeypatch.setattr(streaming, "LARGEST_PART", 4000)
    monkeypatch.setattr(streaming, "SMALLEST_PART", 100)
    for name, format in OUTPUTS.items():
        merge(paths, output=tmp_path / name, format=format)
        found = result(tmp_path / name)
        for key, tensor in result(tmp_path / "whole.pt").items():
            assert torch.equal(found[key], tensor), (name, key)
    boxes = open_checkpoint(tmp_path / "distributed").tensors["w"].boxes
    assert len(boxes) == -(-900 * 7 * 4 // (4000 // 28 * 28))


def test_the_record_is_in_the_metadata_of_every_format(tmp_path: Path, inputs: list[Path]) -> None:
    records = []
    for name, format in OUTPUTS.items():
        record = merge(inputs, output=tmp_path / name, format=format, schedule="minus-sqrt")
        assert [one.weight for one in record.inputs] == weights_of("minus-sqrt", 3)
        assert [one.path for one in record.inputs] == list(map(str, inputs))
        records.append([one.hash for one in record.inputs])
    assert len(set(map(tuple, records))) == 1 and len(set(records[0])) == 3
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        told = [json.loads(opened.metadata()[RECORD])]
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    told.append(json.loads(loaded._metadata[RECORD]["json"]))
    told += [
        json.loads((tmp_path / name / "merge.json").read_text())
        for name in ("folder", "distributed")
    ]
    for one in told:
        assert one["schedule"] == "minus-sqrt" and one["hash"] == "crc32"
        assert [each["hash"] for each in one["inputs"]] == records[0]
        assert [each["weight"] for each in one["inputs"]] == weights_of("minus-sqrt", 3)


def test_hashes_are_of_what_is_in_the_tensors(tmp_path: Path) -> None:
    def hash_of(tensors: dict[str, Tensor], format: str = "torch", **given: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        save(tensors, path, format)
        return merge(path, output=tmp_path / "o.pt", **given).inputs[0].hash

    first = hash_of(state(1))
    assert all(hash_of(state(1), format) == first for format in FORMATS)
    assert hash_of(dict(reversed(state(1).items()))) == first
    changed = state(1)
    changed["half"][0, 0, 0] += 1
    renamed = state(1)
    renamed["other"] = renamed.pop("scale")
    assert len({first, hash_of(changed), hash_of(renamed), hash_of(state(2))}) == 4
    assert len(hash_of(state(1), hash="sha256")) == 64
    assert hash_of(state(1), hash="none") == ""


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)
            self.outer = nn.Linear(3, 3, bias=False)
            self.outer.weight = self.inner.weight

    models = [Tied() for _ in range(2)]
    paths = []
    for number, model in enumerate(models):
        paths.append(tmp_path / f"{number}.pt")
        torch.save(model.state_dict(), paths[-1])
    mean = (models[0].inner.weight + models[1].inner.weight).detach() / 2
    merge(paths, output=tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert loaded["inner.weight"].data_ptr() == loaded["outer.weight"].data_ptr()
    merge(paths, output=tmp_path / "o.safetensors")
    fresh = Tied()
    load_model(fresh, str(tmp_path / "o.safetensors"))
    assert fresh.outer.weight is fresh.inner.weight
    torch.testing.assert_close(fresh.inner.weight.detach(), mean)
    again = open_checkpoint(tmp_path / "o.safetensors")
    assert again.tied == {"outer.weight": "inner.weight"}
    merge(paths, output=tmp_path / "d", format="distributed")
    for tensor in result(tmp_path / "d").values():
        torch.testing.assert_close(tensor, mean)
    # In one of them they are two tensors with values of their own: then in the result too.
    apart = {"inner.weight": torch.zeros(3, 3), "outer.weight": torch.ones(3, 3)}
    torch.save(apart, tmp_path / "2.pt")
    merge([paths[0], tmp_path / "2.pt"], output=tmp_path / "p.pt")
    found = result(tmp_path / "p.pt")
    torch.testing.assert_close(
        found["outer.weight"] - found["inner.weight"], torch.full((3, 3), 0.5)
    )


def test_what_stands_beside_the_tensors_goes_along_or_is_told(tmp_path: Path) -> None:
    module = {**nn.BatchNorm1d(2, affine=False).state_dict(), "_extra_state": {"scale": 3}}
    paths = [save(module, tmp_path / f"{number}.pt", "nested") for number in range(2)]
    with pytest.warns(UserWarning):
        merge(paths, output=tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert loaded.keys() == {"model"}
    assert loaded["model"]["_extra_state"] == {"scale": 3}
    with pytest.warns(UserWarning, match="not written, because safetensors files take .*_extra_st"):
        merge(paths, output=tmp_path / "o.safetensors")
    with pytest.warns(UserWarning):
        merge(paths, output=tmp_path / "d", format="distributed")
    assert open_checkpoint(tmp_path / "d").others == {"_extra_state": {"scale": 3}}


def test_versions_of_modules_go_along(tmp_path: Path) -> None:
    torch.save(nn.BatchNorm1d(2, affine=False).state_dict(), tmp_path / "i.pt")
    with pytest.warns(UserWarning):
        merge(tmp_path / "i.pt", output=tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert loaded._metadata[""] == {"version": 2}
    nn.BatchNorm1d(2, affine=False).load_state_dict(loaded)


# ---- What is there already -----------------------------------------------------------------------


def test_inputs_are_never_written_to(tmp_path: Path) -> None:
    paths = [save(state(seed), tmp_path / f"{seed}", "folder") for seed in (1, 2)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(paths[0])
    file = paths[1] / "model.safetensors"
    for inputs, output in (
        (paths, paths[0]),
        (paths, paths[0] / "inside"),
        (paths, tmp_path / "link"),
        (paths, tmp_path / "link" / "inside.safetensors"),
        (paths, tmp_path),
        ([file], file),
    ):
        with pytest.raises(ValueError, match="are the same, or one is inside the other"):
            merge(inputs, output=output)
    # A folder of links, as the cache of Hugging Face is.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(file)
    with pytest.raises(ValueError, match="is a file of the checkpoint"):
        merge([tmp_path / "linked"], output=file)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before


def test_only_an_earlier_result_is_replaced(tmp_path: Path, inputs: list[Path]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(FileExistsError, match="no result of an earlier merge"):
        merge(inputs, output=tmp_path / "mine", format="safetensors")
    with pytest.raises(FileExistsError, match="is a folder, and a file"):
        (tmp_path / "x.pt").mkdir()
        merge(inputs, output=tmp_path / "x.pt")
    (tmp_path / "empty").mkdir()
    for schedule in ("mean", "minus-sqrt"):
        merge(inputs, output=tmp_path / "empty", format="safetensors", schedule=schedule)
    assert json.loads((tmp_path / "empty/merge.json").read_text())["schedule"] == "minus-sqrt"


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """All that kill_run.py finds, by format and signal."""
    done = processes.run(kill_run.__file__, tmp_path_factory.mktemp("kills"))
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("format", kill_run.FORMATS)
def test_killed_at_any_action_a_merge_leaves_the_old_or_the_new(
    kills: dict[str, list[dict[str, Any]]], format: str
) -> None:
    found = kills[f"{format} SIGKILL"]
    assert len(found) > 5 and found[-1]["done"]
    assert [one["value"] for one in found] == sorted(one["value"] for one in found)
    assert {one["value"] for one in found} == {1.0, 2.0}


@pytest.mark.parametrize("format", ["safetensors", "distributed"])
def test_an_interruption_at_any_action_leaves_nothing_beside(
    kills: dict[str, list[dict[str, Any]]], format: str
) -> None:
    found = kills[f"{format} SIGINT"]
    assert len(found) > 5 and {one["value"] for one in found} <= {1.0, 2.0}
    left = {name for one in found for name in one["left"]}
    assert not [name for name in left if ".partial" in name]


# ---- Many inputs, and little memory --------------------------------------------------------------


def test_a_thousand_inputs_need_few_open_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"step-{number}.safetensors" for number in range(1000)]
    for number, path in enumerate(paths):
        save_file({"w": torch.full((10,), float(number))}, path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 150, before[1]))
    try:
        merge(paths, output=tmp_path / "o.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert result(tmp_path / "o.safetensors")["w"].tolist() == pytest.approx([499.5] * 10, rel=1e-6)


def test_progress_is_told_in_bytes(tmp_path: Path, inputs: list[Path]) -> None:
    told: list[tuple[int, int]] = []
    merge(inputs, output=tmp_path / "o.pt", progress=lambda done, total: told.append((done, total)))
    size = sum(tensor.nbytes for tensor in state(1).values()) * 3
    assert [total for _, total in told] == [size] * len(told)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (size, size)
