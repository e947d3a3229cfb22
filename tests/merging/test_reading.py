"""Checkpoints of every format are recognised by what is in them, and read in parts."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import ema_fused
from ema_fused.merging import merge, open_checkpoint, read_contents
from ema_fused.merging.stored_tensors import Box, OpenFiles, StoredTensor
from ema_fused.saving import checkpoints
from ema_fused.saving.checkpoints import averaged_state_dict
from ema_fused.saving.export import export_safetensors
from tests.merging.checkpoint_files import FORMATS, save, state


def assert_equal(read: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("name", ["whatever.name", "misleading.safetensors", "misleading.pt"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_by_content(tmp_path: Path, format: str, name: str) -> None:
    expected = state(1)
    path = save(expected, tmp_path / "plain", format).rename(tmp_path / name)
    found = open_checkpoint(path)
    assert_equal({name: one.tensor() for name, one in found.tensors.items()}, expected)
    assert found.key == ("model" if format in ("nested", "distributed") else "")
    assert found.bytes == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize("format", FORMATS)
def test_pieces_are_bounded_and_make_the_whole(tmp_path: Path, format: str) -> None:
    expected = state(2)
    for name, one in open_checkpoint(save(expected, tmp_path / "x", format)).tensors.items():
        pieces = list(one.pieces(64))
        assert all(piece.nbytes <= 64 for piece in pieces)
        flat = expected[name].flatten()
        assert torch.equal(torch.cat(pieces) if pieces else flat[:0], flat)


def test_strided_tensors_are_read_in_the_order_of_rows(tmp_path: Path) -> None:
    base = torch.randn(4, 6, 5)
    tensors = {
        "transposed": base[0].t(),
        "rows_apart": base[:, :2, 1:4],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
    }
    torch.save(tensors, tmp_path / "strided.pt")
    found = open_checkpoint(tmp_path / "strided.pt").tensors
    assert found["transposed"].grain == 30
    assert found["rows_apart"].grain == 6
    for name, one in found.items():
        assert torch.equal(torch.cat(list(one.pieces(one.grain * 4))), tensors[name].flatten())


@pytest.mark.parametrize("split", [0, 1, 2])
def test_tensors_in_boxes_are_read_whatever_the_dimension_they_are_split_in(
    tmp_path: Path, split: int
) -> None:
    whole = torch.randn(6, 4, 5)
    boxes, start = [], 0
    with (tmp_path / "file").open("wb") as file:
        offset = 0
        for part in whole.split([1, whole.shape[split] - 1], dim=split):
            file.write(part.contiguous().numpy().tobytes())
            offsets = tuple(offset if dim == split else 0 for dim in range(3))
            sizes = tuple(part.shape)
            boxes.append(Box(tmp_path / "file", start, offsets, sizes, part.contiguous().stride()))
            start, offset = start + part.nbytes, offset + part.shape[split]
    stored = StoredTensor(whole.dtype, tuple(whole.shape), tuple(boxes))
    assert torch.equal(stored.tensor(), whole)
    assert torch.equal(torch.cat(list(stored.pieces(100))), whole.flatten())


def test_a_distributed_checkpoint_of_several_ranks_is_whole_or_refused(tmp_path: Path) -> None:
    path = save({"w": torch.arange(8.0)}, tmp_path / "d", "distributed")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    half = ChunkStorageMetadata(torch.Size([0]), torch.Size([8]))
    metadata.state_dict_metadata["model.w"].size = torch.Size([16])
    metadata.state_dict_metadata["model.w"].chunks = [half]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not whole"):
        open_checkpoint(path)


def test_tied_tensors_are_known(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    torch.save(model.state_dict(), tmp_path / "t.pt")
    save_model(model, str(tmp_path / "s.safetensors"))
    ema = ema_fused.PowerFunctionEMA(model)
    ema.update_parameters(model)
    for path in (tmp_path / "t.pt", tmp_path / "s.safetensors", ema.save_snapshot(tmp_path)[0]):
        found = open_checkpoint(path)
        assert list(found.tensors) == ["a.weight"]
        assert found.tied == {"b.weight": "a.weight"}


def test_our_own_files_are_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    averaged = ema_fused.AveragedWeights(model)
    torch.save({"averaged": averaged.state_dict(), "epoch": 3}, tmp_path / "state.pt")
    export_safetensors(averaged.weights, tmp_path / "export")
    found = open_checkpoint(tmp_path / "state.pt")
    assert found.key == "averaged" and {"steps", "module.0.weight"} <= found.tensors.keys()
    checkpoints.save({"averaged": averaged_state_dict(averaged, model)}, tmp_path / "sharded")
    assert open_checkpoint(tmp_path / "sharded").tensors.keys() == found.tensors.keys()
    assert open_checkpoint(tmp_path / "export").tensors.keys() == averaged.weights.keys()
    ema = ema_fused.PowerFunctionEMA(model)
    ema.update_parameters(model)
    snapshot = open_checkpoint(ema.save_snapshot(tmp_path)[0])
    assert "1.running_mean" in snapshot.copied and "0.weight" not in snapshot.copied


def test_an_adapter_of_peft_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    model.save_pretrained(tmp_path / "adapter")
    names = open_checkpoint(tmp_path / "adapter").tensors
    assert len(names) == 2 and all("lora_" in name for name in names)


# ---- Where the weights are -----------------------------------------------------------------------


def test_several_dictionaries_of_tensors_are_listed(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt", "nested", ema={"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"choose one by key: 'model', 'ema'$"):
        open_checkpoint(path)
    assert open_checkpoint(path, "ema").tensors["w"].tensor().tolist() == [0, 0]
    with pytest.raises(ValueError, match="no dictionary of tensors at key 'none'; there are: 'mod"):
        open_checkpoint(path, "none")
    torch.save({"state": {"model": {"w": torch.ones(2)}}}, path)
    with pytest.raises(
        ValueError, match="no dictionary of tensors at key 'state'; there are: 'sta"
    ):
        open_checkpoint(path, "state")


def test_keys_may_have_dots_in_them_and_other_tensors_do_not_count(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2)}
    other = {"rng": torch.zeros(9, dtype=torch.uint8), "step": torch.tensor(3.0)}
    torch.save({**other, "a.b": {"c": weights}}, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").key == "a.b.c"
    assert set(open_checkpoint(tmp_path / "x.pt", "").tensors) == {"rng", "step"}


def test_everything_beside_the_tensors_is_kept(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt", "nested", extra=[1, "two"])
    tree = read_contents(path).tree
    assert tree["extra"] == [1, "two"] and tree["step"] == 7
    assert tree["optimizer"]["state"][0]["exp_avg"].tensor().tolist() == [1, 1, 1]
    path = save({"w": torch.ones(2)}, tmp_path / "d", "distributed", step=7)
    assert read_contents(path).tree["step"] == 7


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").versions[""] == {"version": 2}


# ---- What is refused -----------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class System(Evil):
    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def test_what_trainers_write_beside_weights_is_no_code(tmp_path: Path) -> None:
    history = pytest.importorskip("mmengine.logging").HistoryBuffer([0.5], [1])
    beside = {
        "log": {"loss": history},  # mmengine's
        "args": argparse.Namespace(lr=0.1),  # timm's
        "hyper_parameters": {"folder": tmp_path},  # Lightning's
    }
    paths = []
    for number in (1.0, 3.0):
        paths.append(tmp_path / f"{number}.pt")
        torch.save({"state_dict": {"w": torch.tensor([number])}, **beside}, paths[-1])
        with pytest.raises(pickle.UnpicklingError):
            torch.load(paths[-1], weights_only=True)
    merge(paths, output=tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt", weights_only=True)
    assert merged.keys() == {"state_dict"} and merged["state_dict"]["w"].item() == 2
    for path in paths:  # directly beside the tensors
        torch.save({"w": torch.ones(1), "best": 3, "args": beside["args"]}, path)
    with pytest.warns(UserWarning, match=r"objects of classes are not loaded: args of .*3\.0\.pt"):
        merge(paths, output=tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == {"w", "best"}


@pytest.mark.parametrize(
    ("evil", "told"), [(Evil, r"GLOBAL pathlib\.\S*Path was not an allowed"), (System, "system")]
)
def test_the_code_that_is_refused_is_named(tmp_path: Path, evil: Any, told: str) -> None:
    torch.save({"w": torch.ones(2), "x": evil(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"is refused \([^()]*{told}[^()]*\)\. Save") as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert "`weights_only` set to `False`" not in str(caught.value)
    assert "\x1b" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["torch", "pickle", "metadata", "part"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "x"
    if where == "torch":
        torch.save({"w": torch.ones(2), "evil": Evil(mark)}, path)
    elif where == "pickle":
        path.write_bytes(pickle.dumps(Evil(mark)))
    else:
        evil = {"evil": Evil(mark)} if where == "part" else {}
        save({"w": torch.ones(2)}, path, "distributed", **evil)
        if where == "metadata":
            (path / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    if where == "part":  # it is in a file part of its own, and the weights are read without it
        assert open_checkpoint(path, "model").tensors["w"].tensor().tolist() == [1, 1]
    key = "" if where == "part" else None
    with pytest.raises(ValueError, match=r"running code|could be code|is a pickle"):
        open_checkpoint(path, key)
    assert not mark.exists()


@pytest.mark.parametrize("format", ["safetensors", "torch", "distributed"])
def test_truncated_files_are_refused(tmp_path: Path, format: str) -> None:
    path = save({"w": torch.randn(999)}, tmp_path / "x", format)
    file = path / "__0_0.distcp" if format == "distributed" else path
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"no whole|truncated"):
        open_checkpoint(path).tensors["w"].tensor()


@pytest.mark.parametrize("file", ["x.pt", "x/.metadata", "x/__0_0.distcp"])
def test_damaged_pickles_are_refused_whatever_their_bytes_mean(tmp_path: Path, file: str) -> None:
    tensors = {"w": torch.ones(9, 2), "n": torch.arange(3)}
    format = "torch" if file == "x.pt" else "distributed"
    path = save(tensors, tmp_path / Path(file).parts[0], format)
    whole = (tmp_path / file).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        # Where the pickle is, not where the values are.
        begin = max(0, damaged.find(b"\x80\x02"))
        for place in random.integers(begin, min(begin + 400, len(whole)), 3):
            damaged[place] = random.integers(256)
        (tmp_path / file).write_bytes(damaged)
        try:
            open_checkpoint(path)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused > 100


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = save({"w": torch.randn(999)}, tmp_path / "x", "safetensors")
    found = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path} ends at byte"):
        found.tensors["w"].tensor()


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ValueError, match="no whole safetensors file"):
        open_checkpoint(tmp_path / "x")


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    save({"w": torch.ones(2)}, tmp_path / "secret.safetensors", "safetensors")
    (tmp_path / "folder").mkdir()
    index = {"weight_map": {"w": "../secret.safetensors"}}
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no such file beside it"):
        open_checkpoint(tmp_path / "folder")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="neither a safetensors file nor one of torch"):
        open_checkpoint(tmp_path / "text")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent")
    for number in (1, 2):
        save_file({"w": torch.ones(2)}, tmp_path / f"{number}.safetensors")
    with pytest.raises(ValueError, match=r"several files of weights \(1.safetensors, 2"):
        open_checkpoint(tmp_path)


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    before = len(list(Path("/proc/self/fd").iterdir()))
    byte = memoryview(bytearray(1))
    with OpenFiles(most=4) as files:
        for number, path in enumerate([*paths, *paths]):
            files.read(path, 0, byte)
            assert byte[0] == number % 40
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4
    assert len(list(Path("/proc/self/fd").iterdir())) == before
