"""Files that are converted: what they may hold, how they are written, and the command line."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ema_fused import AveragedWeights, ExponentialMovingAverage, cli
from ema_fused.converting import convert, read_average, writing
from ema_fused.converting.average_state import whole
from ema_fused.converting.recognising_averages import FORMATS, TARGETS
from tests.converting.originals_of_averages import copied, model, train

STEPS = 3


def average_of(net: nn.Module) -> ExponentialMovingAverage:
    averaged = ExponentialMovingAverage(net, momentum=0.1)
    for step in range(STEPS):
        train(net, step)
        averaged.update_parameters(net)
    return averaged


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training's checkpoint, with the weights and our average of them."""
    net = model()
    averaged = average_of(net)
    path = tmp_path / "run.pt"
    torch.save({"model": net.state_dict(), "ema": averaged.state_dict(), "epoch": 4}, path)
    (tmp_path / "names.txt").write_text("\n".join(name for name, _ in net.named_parameters()))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "Small", "decay": "rates"}')
    return path


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


class System:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.path}",)


class History:
    """A class of a framework: it has a constructor, and a state."""

    made = 0

    def __init__(self, values: list[float]) -> None:
        History.made += 1
        self.values = values


@pytest.mark.parametrize("kind", [Runs, System])
def test_no_code_of_a_file_is_run(kind: Any, checkpoint: Path, tmp_path: Path) -> None:
    tree = torch.load(checkpoint)
    bad = tmp_path / "bad.pt"
    torch.save({**tree, "hook": kind(tmp_path / "ran")}, bad)
    try:
        read = read_average(bad)
    except ValueError as error:
        assert "can't be loaded without running code" in str(error)
        assert kind is System
    else:
        assert read.steps == STEPS
        assert kind is Runs
    assert not (tmp_path / "ran").exists()


def test_classes_of_frameworks_are_read_as_nothing(checkpoint: Path, tmp_path: Path) -> None:
    tree = torch.load(checkpoint)
    torch.save({**tree, "log": OrderedDict(loss=History([0.5]))}, tmp_path / "log.pt")
    before = History.made
    assert read_average(tmp_path / "log.pt").steps == STEPS
    assert History.made == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "log.pt", weights_only=True)  # nothing stays allowed


@pytest.mark.parametrize("format", TARGETS)
def test_an_output_is_whole_or_absent(
    format: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_folder = FORMATS[format].output == "folder"
    output = tmp_path / ("new/run/out" if is_folder else "out.pt")
    if not is_folder:
        output.write_text("the one before")

    def full(*given: Any, **_: Any) -> None:
        if hasattr(given[-1], "write"):
            given[-1].write(b"half of it")
        raise OSError(28, "No space left on device")

    if format == "torchtitan":
        monkeypatch.setattr("ema_fused.saving.checkpoints.state_dict_saver.save", full)
    else:
        monkeypatch.setattr(writing.torch, "save", full)
        monkeypatch.setattr(writing, "_bytes_of", full)
    settings = {"names": tmp_path / "names.txt", "folder": tmp_path / "model", "decay": 0.9}
    with pytest.raises(OSError, match="there is no room for"):
        convert(checkpoint, format, output, **settings)  # type: ignore[arg-type]
    left = {path.name for path in tmp_path.iterdir()} - {"run.pt", "names.txt", "model"}
    if is_folder:
        assert not left
    else:
        assert left == {"out.pt"} and output.read_text() == "the one before"


def test_ours_is_a_file_of_either_kind_or_a_distributed_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    expected = torch.load(checkpoint)["ema"]
    for name in ("out.safetensors", "out.pt", "out"):
        convert(checkpoint, "ema_fused", tmp_path / name)
        found = read_average(tmp_path / name)
        assert (found.format, found.steps) == ("ema_fused", STEPS)
        for tensor_name, tensor in found.averaged.items():
            assert torch.equal(whole(tensor), expected[f"module.{tensor_name}"])
    file = load_file(tmp_path / "out.safetensors")
    AveragedWeights(model()).load_state_dict(file)
    assert all(torch.equal(file[name], expected[name]) for name in expected)


def test_tied_tensors_stay_tied_and_unusual_ones_stay_themselves(tmp_path: Path) -> None:
    big = torch.randn(6, 4)
    weights = {
        "embed.weight": big,
        "head.weight": big,
        "turned": torch.randn(4, 6).t(),
        "half": torch.randn(3).to(torch.bfloat16),
        "none": torch.empty(0, 2),
        "scalar": torch.tensor(2.0),
        "mask": torch.tensor([True, False]),
    }
    state = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"steps": torch.tensor(2), **state}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", "torch", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert found["module.embed.weight"].data_ptr() == found["module.head.weight"].data_ptr()
    convert(tmp_path / "out.pt", "ema_fused", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for name, tensor in weights.items():
        for one in (found, back):
            assert torch.equal(one[f"module.{name}"], tensor), name
            assert one[f"module.{name}"].dtype == tensor.dtype


def test_the_input_may_be_the_output(checkpoint: Path) -> None:
    before = torch.load(checkpoint)["ema"]
    convert(checkpoint, "ema-pytorch", checkpoint)
    after = torch.load(checkpoint)
    assert int(after["step"]) == STEPS
    for name in before:
        if name != "steps":
            assert torch.equal(after[name.replace("module.", "ema_model.", 1)], before[name])


def test_a_truncated_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint.read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="no whole file of torch"):
        convert(tmp_path / "half.pt", "torch", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("torch", "out", "is no name of a file of torch.save"),
        ("torch", "out.safetensors", "would be a safetensors file"),
        ("diffusers", "out.pt", "is named as a file"),
        ("diffusers", "model", "is a folder with files in it"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(
    format: str, name: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileExistsError), match=message):
        convert(checkpoint, format, tmp_path / name, folder=tmp_path / "model")


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("torch-ema", "keeps the decay in its state"),
        ("diffusers-list", "names in order by --names FILE"),
        ("diffusers", "needs the config.json of the model"),
    ],
)
def test_what_a_format_cannot_do_without_is_asked_for(
    format: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / ("out" if format == "diffusers" else "out.pt")
    with pytest.raises(ValueError, match=message):
        convert(checkpoint, format, output)


@pytest.mark.parametrize("format", ["lightning", "mmengine", "mmcv"])
def test_the_weights_of_the_model_are_never_made_up(
    format: str, checkpoint: Path, tmp_path: Path
) -> None:
    tree = torch.load(checkpoint)
    torch.save(tree["ema"], tmp_path / "alone.pt")
    torch.save({"state": {"net": tree["model"]}}, tmp_path / "raw.pt")
    with pytest.raises(ValueError, match="pass the checkpoint that has them by --raw"):
        convert(tmp_path / "alone.pt", format, tmp_path / "out.pt")
    convert(tmp_path / "alone.pt", format, tmp_path / "out.pt", raw=tmp_path / "raw.pt")
    found = read_average(tmp_path / "out.pt")
    assert found.raw is not None
    assert torch.equal(whole(found.raw["0.weight"]), tree["model"]["0.weight"])
    assert torch.equal(whole(found.averaged["0.weight"]), tree["ema"]["module.0.weight"])


def test_a_list_gets_names_from_a_state_dict_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"names": tmp_path / "names.txt", "decay": 0.9}
    convert(checkpoint, "torch-ema", tmp_path / "list.pt", **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps a list of averages without names"):
        convert(tmp_path / "list.pt", "torchtitan", tmp_path / "titan")
    torch.save(model().state_dict(), tmp_path / "model.pt")
    convert(tmp_path / "list.pt", "torchtitan", tmp_path / "titan", names=tmp_path / "model.pt")
    found = read_average(tmp_path / "titan").averaged
    expected = torch.load(checkpoint)["ema"]
    assert list(found) == [name for name, _ in model().named_parameters()]
    assert all(torch.equal(whole(found[name]), expected[f"module.{name}"]) for name in found)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="the model that gives the names has 2 parameters"):
        convert(tmp_path / "list.pt", "torch", tmp_path / "o.pt", names=tmp_path / "other.pt")


def test_the_folder_of_our_callback_is_read_and_written(tmp_path: Path) -> None:
    files = pytest.importorskip("ema_fused.callbacks.huggingface_files")
    net = model()
    averaged = average_of(net)
    run = tmp_path / "checkpoint-3"
    run.mkdir()
    torch.save(net.state_dict(), run / "pytorch_model.bin")
    files.write(averaged, net, run / "averaged", sigma_rel=None)
    for path, has_weights in ((run, True), (run / "averaged", False)):
        state = read_average(path)
        assert (state.format, state.steps) == ("huggingface", STEPS)
        assert (state.raw is not None) == has_weights
        for name, tensor in averaged.module.state_dict().items():
            assert torch.equal(whole(state.averaged[name]), tensor)
    convert(run, "huggingface", tmp_path / "again")
    other = ExponentialMovingAverage(net)
    files.read(other, net, tmp_path / "again", sigma_rel=None)
    assert int(other.steps) == STEPS
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_settings_of_a_model_stay_in_its_config(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, "diffusers", tmp_path / "out", folder=tmp_path / "model", decay=0.99)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["_class_name"] == "Small"
    assert (config["decay"], config["min_decay"], config["optimization_step"]) == (0.99, 0.99, 3)


def test_the_commands_print_what_they_did(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.pth"
    given = ["convert", str(checkpoint), "--to", "timm", "-o", str(output)]
    assert cli.main(given) == 0
    printed = capsys.readouterr().out
    assert "8 tensors from ema_fused to timm, steps 3" in printed
    assert "lost or made up: the number of updates (3)" in printed
    assert copied(torch.load(output)["state_dict_ema"]).keys() == model().state_dict().keys()
    assert cli.main(["inspect", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "timm: timm's ModelEma" in printed and "the weights of the model" in printed
    assert cli.main(["inspect", str(output), str(checkpoint)]) == 0
    assert f"compared with  {checkpoint}" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "error:" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "names.txt"), "--to", "torch", "-o", "x.pt"]) == 1
    assert "neither a safetensors file nor one of torch.save" in capsys.readouterr().err


def test_the_files_are_what_torch_writes(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, "torch", tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
    assert isinstance(torch.load(tmp_path / "out.pt", weights_only=True, mmap=True), dict)


def test_a_list_has_no_buffers_and_that_is_told(checkpoint: Path, tmp_path: Path) -> None:
    net = model()
    names = [name for name, _ in net.named_parameters()]
    source = tmp_path / "list.pt"
    convert(checkpoint, "torch-ema", source, names=names, decay=0.9)
    done = convert(source, "torch", tmp_path / "a.pt", names=names)
    assert any(
        text.startswith("buffers, if the model has any: torch-ema has") for text in done.lost
    )
    torch.save(net.state_dict(), tmp_path / "raw.pt")
    done = convert(source, "torch", tmp_path / "b.pt", names=names, raw=tmp_path / "raw.pt")
    assert not any(text.startswith("buffers, if") for text in done.lost)
    AveragedModel(net).load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))


def test_the_only_weights_of_the_model_are_not_overwritten(tmp_path: Path) -> None:
    net = model()
    path = tmp_path / "run.pt"
    torch.save({"model": net.state_dict(), "ema": AveragedModel(net).state_dict()}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="has the weights of the model too, for which ema_fused"):
        convert(path, "ema_fused", path)
    assert path.read_bytes() == before
    convert(path, "timm", path)  # has both
    assert read_average(path).raw is not None
    with pytest.raises(ValueError, match="no average at key 'nope'; there are: timm at key ''"):
        read_average(path, key="nope")
