"""The names in a merged folder, and what it gets of its inputs: so that others can read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ema_fused.merging import merge, open_checkpoint
from tests.merging.checkpoint_files import save, state


def result(path: Path) -> dict[str, Tensor]:
    return {name: one.tensor() for name, one in open_checkpoint(path).tensors.items()}


def test_shards_are_those_of_the_first_or_as_large_as_asked_for(tmp_path: Path) -> None:
    paths = [save(state(seed), tmp_path / f"{seed}", "sharded") for seed in (1, 2)]
    merge(paths, output=tmp_path / "same")
    files = sorted(path.name for path in paths[0].iterdir())
    assert sorted(path.name for path in (tmp_path / "same").iterdir()) == ["merge.json", *files]
    index = "model.safetensors.index.json"
    places = [json.loads((path / index).read_text())["weight_map"] for path in paths]
    assert json.loads((tmp_path / "same" / index).read_text())["weight_map"] == places[0]
    merge(paths, output=tmp_path / "small", max_shard_bytes=500)
    shards = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(one.nbytes for one in tensors.values()) <= 500
    index_text = json.loads((tmp_path / "small" / index).read_text())
    assert index_text["metadata"]["total_size"] == sum(one.nbytes for one in state(1).values())


def test_a_hugging_face_folder_s_other_files_are_carried_over(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        path = save(state(seed), tmp_path / f"checkpoint-{seed}", "folder")
        (path / "config.json").write_text(f'{{"_name_or_path": "{seed}"}}')
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text("{}")
        torch.save({"state": {}}, path / "optimizer.pt")
        (path / "trainer_state.json").write_text("{}")
        (tmp_path / "vocabulary").write_text("a b c")
        (path / "vocab.txt").symlink_to(tmp_path / "vocabulary")
        paths.append(path)
    record = merge(paths, output=tmp_path / "out")
    left = sorted(
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    )
    assert left == [
        "1_Pooling/config.json", "config.json", "merge.json", "model.safetensors", "vocab.txt",
    ]  # fmt: skip
    assert set(record.carried_over) == {"config.json", "vocab.txt", "1_Pooling/config.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"_name_or_path": "2"}
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


def test_adapters_keep_their_name_and_configuration(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        path = tmp_path / f"adapter-{seed}"
        path.mkdir()
        save_file(
            {"lora_A.weight": torch.full((2, 2), float(seed))}, path / "adapter_model.safetensors"
        )
        (path / "adapter_config.json").write_text("{}")
        paths.append(path)
    merge(paths, output=tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "merge.json"]
    assert result(tmp_path / "out")["lora_A.weight"].unique().item() == 1.5


@pytest.mark.parametrize("is_safetensors", [True, False])
@pytest.mark.parametrize("stem", ["adapter_model", "diffusion_pytorch_model", "model"])
def test_files_have_the_name_that_their_package_looks_for(
    tmp_path: Path, stem: str, is_safetensors: bool
) -> None:
    paths = []
    for seed in (1, 2):
        path = tmp_path / str(seed)
        path.mkdir()
        tensors = {"a": torch.full((50,), float(seed)), "b": torch.ones(50)}
        if is_safetensors:
            save_file(tensors, path / f"{stem}.safetensors")
        else:
            torch.save(tensors, path / f"{'pytorch_' * (stem == 'model')}{stem}.bin")
        paths.append(path)
    names = [f"{stem}.safetensors", "merge.json"]
    for out, most in (("plain", None), ("whole", 1000)):
        merge(paths, output=tmp_path / out, max_shard_bytes=most)
        assert {path.name for path in (tmp_path / out).iterdir()} == set(names)
        assert result(tmp_path / out)["a"].unique().item() == 1.5
    if stem == "adapter_model":
        with pytest.raises(ValueError, match="can't be in several files, as PEFT reads one"):
            merge(paths, output=tmp_path / "split", max_shard_bytes=300)
        assert not (tmp_path / "split").exists()
        return
    merge(paths, output=tmp_path / "split", max_shard_bytes=300)
    assert {path.name for path in (tmp_path / "split").iterdir()} == {
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
        f"{stem}.safetensors.index.json",
        "merge.json",
    }


def test_files_of_a_variant_are_those_of_one_model(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        path = tmp_path / f"model-{seed}"
        path.mkdir()
        places = {}
        for number, name in enumerate(("a", "b"), start=1):
            file = f"model.fp16-{number:05d}-of-00002.safetensors"
            save_file({name: torch.full((5,), float(seed))}, path / file)
            places[name] = file
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
        paths.append(path)
    merge(paths, output=tmp_path / "out")
    names = {path.name for path in paths[0].iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "merge.json"}
    assert result(tmp_path / "out")["b"].unique().item() == 1.5


def test_the_configuration_tells_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    path = save(state(1), tmp_path / "model", "folder")
    told = {"dtype": "float32", "text_config": {"torch_dtype": "float32"}, "name": "float32"}
    (path / "config.json").write_text(json.dumps(told))
    merge(path, output=tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == told
    merge(path, output=tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == {
        "dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}, "name": "float32",
    }  # fmt: skip
    assert json.loads((path / "config.json").read_text()) == told


def test_a_folder_of_torch_save_has_the_names_of_its_package(tmp_path: Path) -> None:
    path = save(state(1), tmp_path / "model", "folder")
    merge(path, output=tmp_path / "out", format="torch")
    assert (tmp_path / "out" / "pytorch_model.bin").is_file()
    (path / "config.json").unlink()
    merge(path, output=tmp_path / "plain", format="torch")
    assert (tmp_path / "plain" / "model.pt").is_file()


def test_timm_s_names_are_names_of_files(tmp_path: Path) -> None:
    paths = [save(state(seed), tmp_path / f"checkpoint-{seed}.pth.tar", "torch") for seed in (1, 2)]
    merge(paths, output=tmp_path / "averaged.pth.tar")
    loaded = torch.load(tmp_path / "averaged.pth.tar", weights_only=True)
    assert loaded.keys() == state(1).keys()
