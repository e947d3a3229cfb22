"""Averaged weights as safetensors files: what is in them, and what happens when they can't be."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.saving import export
from ema_fused.saving.checkpoints import averaged_state_dict
from ema_fused.saving.export import export_safetensors
from tests.ranks import Ranks
from tests.sharded_models import Perceptron, perceptron, spread, train, trainer, whole_weights

safetensors_torch = pytest.importorskip("safetensors.torch", reason="what is exported")


def averaged_perceptron(dtype: torch.dtype | None = None) -> AveragedWeights:
    """The average of two models, buffers of integers among its tensors."""
    averaged = AveragedWeights(perceptron(0), momentum=0.25, averaged_dtype=dtype)
    averaged.update_parameters(perceptron(0))
    averaged.update_parameters(perceptron(1))
    return averaged


def contents(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        found.update(safetensors_torch.load_file(file))
    return found


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def below(directory: Path) -> list[str]:
    """Every file and folder, so that nothing half-written is left anywhere."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_one_file_holds_the_averages_and_loads_into_the_model(tmp_path: Path) -> None:
    averaged = averaged_perceptron()
    files = export_safetensors(averaged.weights, tmp_path / "out")
    assert files == [tmp_path / "out" / "model.safetensors"]
    assert below(tmp_path) == ["out", "out/model.safetensors"]
    assert_same_tensors(contents(files), averaged.weights)
    with safetensors_torch.safe_open(files[0], "pt") as file:
        # transformers refuses a file that doesn't say so.
        assert file.metadata() == {"format": "pt"}

    model = perceptron(5)
    model.load_state_dict(contents(files), strict=True)
    assert not torch.equal(model.first.weight, perceptron(1).first.weight)
    assert torch.equal(model.first.weight, averaged.weights["first.weight"])


def test_dtype_converts_floating_point_tensors_alone(tmp_path: Path) -> None:
    averaged = averaged_perceptron(torch.float64)
    files = export_safetensors(averaged.weights, str(tmp_path / "out"), dtype=torch.bfloat16)
    wanted = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in averaged.weights.items()
    }
    assert wanted["norm.num_batches_tracked"].dtype == torch.int64
    assert_same_tensors(contents(files), wanted)
    assert averaged.weights["first.weight"].dtype == torch.float64


@pytest.mark.parametrize("most", [1, 100, 200, 405, 406])
def test_shards_are_named_indexed_and_no_larger_than_asked(tmp_path: Path, most: int) -> None:
    weights = averaged_perceptron().weights
    files = export_safetensors(
        weights, tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=most
    )
    assert_same_tensors(
        contents(files),
        {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in weights.items()},
    )
    by_file = {file.name: safetensors_torch.load_file(file) for file in files}
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in by_file.items()}
    for name, tensors in by_file.items():
        assert sizes[name] <= most or len(tensors) == 1, name
    if most == 406:  # all of them, to the byte
        assert [*by_file] == ["model.safetensors"]
        return
    count = len(files)
    assert count == {1: len(weights), 100: 5, 200: 3, 405: 2}[most]
    assert [*by_file] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, tensors in by_file.items() for name in tensors},
    }
    assert len(below(tmp_path / "out")) == count + 1


class _HostTensors:
    """Which of the tensors made for the files are in memory at each write of a file."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at_writes: list[tuple[int, set[str]]] = []
        self.made: list[weakref.ref[Tensor]] = []
        self._make, self._save = export._on_host, safetensors_torch.save_file
        patch.setattr(export, "_on_host", self._on_host)
        patch.setattr(safetensors_torch, "save_file", self._save_file)

    def _on_host(self, *arguments: Any) -> Tensor:
        made = self._make(*arguments)
        self.made.append(weakref.ref(made))
        return made

    def _save_file(self, tensors: dict[str, Tensor], *arguments: Any) -> None:
        alive = sum(reference() is not None for reference in self.made)
        self.at_writes.append((alive, set(tensors)))
        self._save(tensors, *arguments)


def test_one_files_tensors_are_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = _HostTensors(monkeypatch)
    weights = averaged_perceptron().weights
    files = export_safetensors(weights, tmp_path / "out", max_shard_bytes=200)
    assert [names for _, names in host.at_writes] == [set(contents([file])) for file in files]
    assert [alive for alive, _ in host.at_writes] == [len(names) for _, names in host.at_writes]
    assert len(files) == 5


def test_tied_tensors_and_views_are_written_whole_under_each_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.every_second = nn.Parameter(torch.randn(6, 4)[::2])
            self.turned = nn.Parameter(torch.randn(6, 4).t())
            self.nothing = nn.Parameter(torch.empty(0, 3))
            self.number = nn.Parameter(torch.tensor(2.5))

    model = Tied()
    averaged = ExponentialMovingAverage(model)
    for weights in (dict(averaged.module.state_dict()), dict(model.named_parameters())):
        weights |= {"head.weight": weights["embedding.weight"]}
        files = export_safetensors(weights, tmp_path / "out")
        assert_same_tensors(contents(files), weights)
        assert_same_tensors(contents(files), dict(model.state_dict()))


def test_the_state_of_an_averaged_model_is_written_under_the_models_names(tmp_path: Path) -> None:
    averaged = averaged_perceptron()
    for state in (averaged.state_dict(), averaged_state_dict(averaged, perceptron())):
        assert "steps" in state
        files = export_safetensors(state, tmp_path / "out")
        assert_same_tensors(contents(files), averaged.weights)

    # A model may call something "steps" or "module" itself.
    for names in (["steps", "weight"], ["steps", "module.weight", "head.weight"], ["module.a"]):
        weights = {name: torch.ones(1) for name in names}
        assert_same_tensors(contents(export_safetensors(weights, tmp_path / "out")), weights)


META = torch.empty(2, device="meta")


@pytest.mark.parametrize(
    ("weights", "options", "error", "says"),
    [
        ({}, {}, ValueError, "weights is empty"),
        ({"a": META}, {}, ValueError, "'a' is on the meta device"),
        ({"a": torch.ones(1), "b": [1.0]}, {}, TypeError, "'b' is a list"),
        ({"s": torch.eye(2).to_sparse()}, {}, TypeError, "'s' is a torch.sparse_coo tensor"),
        ({"a": torch.ones(1)}, {"max_shard_bytes": 0}, ValueError, "max_shard_bytes is 0"),
        ({"a": torch.ones(1)}, {"dtype": torch.int8}, ValueError, "dtype is torch.int8"),
    ],
)
def test_what_cannot_be_exported_is_named_and_leaves_what_was_there(
    tmp_path: Path, weights: Any, options: Any, error: type[Exception], says: str
) -> None:
    (file,) = export_safetensors({"kept": torch.ones(3)}, tmp_path / "out")
    with pytest.raises(error, match=says):
        export_safetensors(weights, tmp_path / "out", **options)
    assert_same_tensors(contents([file]), {"kept": torch.ones(3)})
    assert below(tmp_path) == ["out", "out/model.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = export_safetensors({"kept": torch.ones(3)}, tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "new" / "run" / "out"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
            _fail_at_the_second_file(patch)
            export_safetensors(averaged_perceptron().weights, out, max_shard_bytes=200)
    assert_same_tensors(contents([file]), {"kept": torch.ones(3)})
    assert below(tmp_path) == ["out", "out/model.safetensors"]


def _fail_at_the_second_file(patch: pytest.MonkeyPatch) -> None:
    save = safetensors_torch.save_file
    calls: list[Any] = []

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        save(tensors, path, metadata)
        if len(calls) == 2:
            raise OSError("the disk is full")

    patch.setattr(safetensors_torch, "save_file", save_file)


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    weights = averaged_perceptron().weights
    out = tmp_path / "out"
    export_safetensors(weights, out, max_shard_bytes=200)
    export_safetensors(weights, out)
    assert below(tmp_path) == ["out", "out/model.safetensors"]

    (out / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds 'config\.json' too"):
        export_safetensors(weights, out)
    assert below(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]


# On two processes: the functions run in both.


def _spread_average(way: str) -> tuple[AveragedWeights, nn.Module]:
    model = spread(perceptron(), way)
    averaged = AveragedWeights(model, momentum=0.25, update_buffers=True)
    optimizer = trainer(model)
    for step in range(3):
        train(model, optimizer, step, way)
        averaged.update_parameters(model)
    return averaged, model


def _export_spread(way: str, out: Path, what: str) -> tuple[list[Path], dict[str, Tensor], int]:
    """The files, all of the averaged weights, and how many tensors came to this host's memory."""
    averaged, model = _spread_average(way)
    if what == "weights":
        weights: Any = averaged.weights
    elif what == "state":
        weights = averaged_state_dict(averaged, model)
    else:
        # torch crashes where cpu_offload is asked of FSDP1 and all is on the CPU already.
        offload = way != "fsdp1"
        weights = averaged_state_dict(averaged, model, full_state_dict=True, cpu_offload=offload)
    with pytest.MonkeyPatch.context() as patch:
        host = _HostTensors(patch)
        files = export_safetensors(weights, out, max_shard_bytes=200)
    averaged.copy_to(model)
    values = whole_weights(model)
    assert all(alive == len(names) for alive, names in host.at_writes)
    return files, values, len(host.made)


@pytest.mark.parametrize(
    ("way", "what"),
    [
        ("fsdp2", "weights"),
        ("fsdp2", "state"),
        ("fsdp2", "whole state"),
        ("tensor_parallel", "weights"),
        ("ddp", "weights"),
        ("fsdp1", "whole state"),
    ],
)
def test_the_first_process_writes_what_all_of_them_hold(
    two_ranks: Ranks, tmp_path: Path, way: str, what: str
) -> None:
    (files, values, gathered), others = two_ranks.run(_export_spread, way, tmp_path / "out", what)
    found = contents(files)
    assert_same_tensors(found, values)
    Perceptron().load_state_dict(found, strict=True)
    assert len(files) == 5
    assert gathered == len(values)
    assert others[0] == files
    assert others[2] == 0, "the other process keeps nothing"
    assert below(tmp_path)[0] == "out"
    assert len(below(tmp_path)) == 1 + len(files) + 1


def _attempt(what: str, out: Path) -> str:
    """What is raised, in this process."""
    averaged, model = _spread_average("fsdp1" if what == "fsdp1" else "fsdp2")
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        weights: Any = {} if what == "empty" else averaged.weights
        if what == "write" and rank == 0:
            _fail_at_the_second_file(patch)
        if what == "copy" and rank == 0:
            # At the first of a file's tensors, while the other process waits to gather the rest.
            patch.setattr(export, "_on_host", lambda *_: 1 / 0)
        if what == "meta" and rank == 1:
            weights["last.bias"] = META
        if what == "fewer" and rank == 1:
            del weights["last.bias"]
        if what == "foreign" and rank == 0:
            out.mkdir()
            (out / "config.json").write_text("{}")
        if what == "fsdp1":
            weights = averaged_state_dict(averaged, model)
        try:
            export_safetensors(weights, out, max_shard_bytes=10**6 if what == "copy" else 200)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("write", "OSError: the disk is full", "RuntimeError: process 0 .+the disk is full"),
        ("copy", "ZeroDivisionError", "RuntimeError: process 0 .+ZeroDivisionError"),
        ("meta", "RuntimeError: process 1 .+'last.bias'", "ValueError: 'last.bias' is on the meta"),
        ("fewer", r"RuntimeError: .+different DTensors \(7, 6", "RuntimeError: .+different"),
        ("empty", "ValueError: weights is empty", "RuntimeError: process 0 .+weights is empty"),
        ("foreign", "FileExistsError: .+config.json", "RuntimeError: process 0 .+config.json"),
        ("fsdp1", "TypeError: 'scale' is a ShardedTensor", "TypeError: 'scale'"),
    ],
)
def test_what_fails_in_one_process_is_raised_in_both(
    two_ranks: Ranks, tmp_path: Path, what: str, first: str, second: str
) -> None:
    said = two_ranks.run(_attempt, what, tmp_path / "out")
    assert re.match(first, said[0]), said
    assert re.match(second, said[1]), said
    assert below(tmp_path) == (["out", "out/config.json"] if what == "foreign" else [])
    # They still can work together.
    _, second_run = two_ranks.run(_export_spread, "fsdp2", tmp_path / "again", "weights")
    assert len(second_run[0]) == 5
