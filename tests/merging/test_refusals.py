"""What differs between checkpoints is told whole, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ema_fused
from ema_fused.merging import merge, open_checkpoint
from ema_fused.merging.choosing import chosen
from ema_fused.merging.numbers_in_names import numbers_of
from tests.merging.checkpoint_files import save, state


def files(folder: Path, *states: dict[str, Tensor], format: str = "torch") -> list[Path]:
    return [save(one, folder / f"{number}", format) for number, one in enumerate(states)]


def result(path: Path) -> dict[str, Tensor]:
    return {name: one.tensor() for name, one in open_checkpoint(path).tensors.items()}


def test_every_difference_is_listed(tmp_path: Path) -> None:
    other = state(2, extra=torch.ones(2))
    other["layer.bias"] = other["layer.bias"].float()
    other["half"] = other["half"][:2]
    del other["scale"]
    paths = files(tmp_path, state(1), other)
    with pytest.raises(ValueError, match="differ in 4 tensors, and nothing was written") as caught:
        merge(paths, output=tmp_path / "o.pt")
    told = str(caught.value).splitlines()[1:]
    assert told == [
        f"  'layer.bias': torch.bfloat16 [11] in {paths[0]}; torch.float32 [11] in {paths[1]}",
        f"  'half': torch.float16 [5, 3, 7] in {paths[0]}; torch.float16 [2, 3, 7] in {paths[1]}",
        f"  'scale': torch.float32 [] in {paths[0]}; not there in {paths[1]}",
        f"  'extra': not there in {paths[0]}; torch.float32 [2] in {paths[1]}",
    ]
    assert sorted(tmp_path.iterdir()) == paths


def test_what_differs_is_left_out_when_that_is_asked_for(tmp_path: Path) -> None:
    paths = files(tmp_path, state(1), state(2, extra=torch.ones(2)))
    record = merge(paths, output=tmp_path / "a.pt", only_common=True)
    assert record.left_out == ("extra",)
    assert result(tmp_path / "a.pt").keys() == state(1).keys()
    record = merge(paths, output=tmp_path / "b.pt", ignore="^extra$|layer")
    assert set(record.left_out) == {"extra", "layer.weight", "layer.bias"}
    assert "layer.weight" not in result(tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no regular expression"):
        merge(paths, output=tmp_path / "c.pt", ignore="(")
    with pytest.raises(ValueError, match="no tensor in common"):
        merge(paths, output=tmp_path / "c.pt", ignore="")


def test_single_numbers_are_the_last_s_and_other_integers_must_be_equal(tmp_path: Path) -> None:
    one = {"w": torch.ones(2), "count": torch.tensor(3), "ids": torch.arange(4)}
    other = {"w": torch.ones(2), "count": torch.tensor(8), "ids": torch.tensor([0, 1, 2, 9])}
    mask = {"mask": torch.tensor([True, False])}
    paths = files(tmp_path, one | mask, other | {"mask": ~mask["mask"]})
    with pytest.raises(ValueError, match=r"'ids' \(torch.int64\) in .*1, 'mask' \(torch.bool\)"):
        merge(paths, output=tmp_path / "o.pt")
    assert not (tmp_path / "o.pt").exists()
    merge(paths, output=tmp_path / "o.pt", integers="last")
    found = result(tmp_path / "o.pt")
    assert found["count"] == 8 and found["ids"].tolist() == [0, 1, 2, 9]
    assert found["mask"].tolist() == [False, True]
    merge(paths, output=tmp_path / "p.pt", ignore="ids|mask")
    assert result(tmp_path / "p.pt")["count"] == 8
    with pytest.raises(ValueError, match=r"'count' \(torch.int64\)"):
        merge(paths, output=tmp_path / "q.pt", ignore="ids|mask", integers="equal")


def test_statistics_of_batch_norm_are_warned_of(tmp_path: Path) -> None:
    states = [dict(nn.BatchNorm1d(2).state_dict()) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"2 statistics of batch norm .*update_bn\(loader"):
        merge(files(tmp_path, *states), output=tmp_path / "o.pt")


def test_a_checkpoint_given_twice_counts_twice_and_is_told(tmp_path: Path) -> None:
    paths = files(tmp_path, {"w": torch.tensor([0.0])}, {"w": torch.tensor([3.0])})
    (tmp_path / "link").symlink_to(paths[1])
    with pytest.warns(UserWarning, match=f"given more than once, with as many weights: {paths[1]}"):
        merge([*paths, tmp_path / "link"], output=tmp_path / "o.pt")
    assert result(tmp_path / "o.pt")["w"].item() == pytest.approx(2.0)


def test_one_checkpoint_is_copied(tmp_path: Path) -> None:
    merge(files(tmp_path, state(1)), output=tmp_path / "o.pt")
    found = result(tmp_path / "o.pt")
    for name, tensor in state(1).items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": [1.0]}, "1 weights were given for 2 checkpoints"),
        ({"weights": [1.0, 1.0], "schedule": "mean"}, "both weights and a schedule"),
        ({"weights": [1.0, -1.0]}, "sum to 0"),
        ({"weights": [1.0, float("inf")], "normalise": False}, "finite numbers are expected"),
        ({"schedule": "power:0.1"}, "needs the steps"),
        ({"integers": "first"}, "integers 'first' is none of"),
        ({"rounding": "up"}, "rounding 'up' is none of"),
        ({"hash": "md4"}, "hash 'md4' is none of"),
        ({"format": "onnx"}, "format 'onnx' is none of"),
        ({"dtype": torch.int8}, "a floating-point dtype is expected"),
        ({"last": 0}, "last is 0"),
        ({"every": 0}, "every is 0"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"max_shard_bytes": 9}, "for safetensors files in a folder"),
        ({"format": "distributed"}, "a distributed checkpoint is a folder"),
        ({"memory": 1000}, r"raise memory \(--memory\)"),
    ],
)
def test_arguments_out_of_range_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    paths = [save({"w": torch.ones(2)}, tmp_path / name, "torch") for name in "ab"]
    with pytest.raises(ValueError, match=message):
        merge(paths, output=tmp_path / "o.pt", **given)
    assert sorted(tmp_path.iterdir()) == paths


def test_paths_that_are_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        merge([tmp_path / "absent"], output=tmp_path / "o.pt")
    with pytest.raises(ValueError, match="at least one path is expected"):
        merge([], output=tmp_path / "o.pt")


def test_snapshots_are_not_weighted_by_power(tmp_path: Path) -> None:
    from ema_fused import PowerFunctionEMA

    model = nn.BatchNorm1d(2)
    ema = PowerFunctionEMA(model)
    ema.update_parameters(model)
    with pytest.raises(ValueError, match="python -m ema_fused reconstruct"):
        merge(ema.save_snapshot(tmp_path), output=tmp_path / "o.pt", schedule="power:0.1")


# ---- A run's folder ------------------------------------------------------------------------------


def run_of(folder: Path, *steps: int) -> Path:
    folder.mkdir()
    for step in steps:
        save({"w": torch.tensor([float(step)])}, folder / f"step-{step}.pt", "torch")
    return folder


def test_a_run_s_folder_stands_for_its_checkpoints_in_order_of_numbers(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 900, 1000, 100, 500)
    (run / "notes-7.txt").write_text("not a checkpoint")
    (run / "latest.pt").symlink_to(run / "step-1000.pt")

    def steps(**given: Any) -> list[int]:
        record = merge(run, output=tmp_path / "o.pt", **given)
        return [int(re.findall(r"\d+", Path(one.path).name)[0]) for one in record.inputs]

    assert steps() == [100, 500, 900, 1000]
    assert steps(last=2) == [900, 1000]
    assert steps(every=2) == [500, 1000]
    assert steps(every=3, last=1) == [1000]
    with pytest.warns(UserWarning, match="last is 3, and there are 2 checkpoints to take it of"):
        assert steps(every=2, last=3) == [500, 1000]
    merge(run, output=tmp_path / "o.pt", schedule="power:0.1")
    by_name = result(tmp_path / "o.pt")["w"]
    merge(run, output=tmp_path / "o.pt", schedule="power:0.1", steps=[100, 500, 900, 1000])
    assert torch.equal(by_name, result(tmp_path / "o.pt")["w"])
    merge(run, output=tmp_path / "o.pt", schedule="power:0.1", steps=[1, 2, 3, 4])
    assert not torch.equal(by_name, result(tmp_path / "o.pt")["w"])


def test_a_folder_with_two_kinds_of_checkpoints_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 1, 2)
    save({"w": torch.ones(1)}, run / "optimizer-2.pt", "torch")
    with pytest.raises(ValueError, match=r"several kinds of checkpoints \(optimizer-\*.pt, step-"):
        merge(run, output=tmp_path / "o.pt")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds none with a number in its name"):
        merge(tmp_path / "none", output=tmp_path / "o.pt")


def test_the_step_in_a_name_counts_whatever_follows_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    names = {
        "epoch=2-step=200-val_loss=0.9.ckpt": 200,
        "epoch=10-step=1000-val_loss=0.31.ckpt": 1000,
        "epoch=11-step=1100-val_loss=0.4.ckpt": 1100,
    }
    for name, step in names.items():
        save({"w": torch.tensor([float(step)])}, run / name, "torch")
    record = merge(run, output=tmp_path / "o.pt")
    assert [Path(one.path).name for one in record.inputs] == list(names)
    merge(run, output=tmp_path / "o.pt", schedule="power:0.1")
    by_name = result(tmp_path / "o.pt")["w"]
    merge(run, output=tmp_path / "o.pt", schedule="power:0.1", steps=[200, 1000, 1100])
    assert torch.equal(by_name, result(tmp_path / "o.pt")["w"])
    assert numbers_of(["step-9-acc97", "step-10-acc95"]) == [(9,), (10,)]
    assert numbers_of(["e1-s20", "e1-s10", "e2-s10"]) == [(1, 20), (1, 10), (2, 10)]
    for number in (3, 20, 100):
        save({"w": torch.ones(1)}, tmp_path / f"s{number}-seed7", "folder")
    assert [path.name for path in chosen([tmp_path], every=1)] == [
        "s3-seed7",
        "s20-seed7",
        "s100-seed7",
    ]


def test_what_a_shell_lists_is_taken_by_the_numbers(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 200, 1000, 900)
    listed = sorted(run.iterdir())  # 1000, 200, 900
    with pytest.warns(UserWarning, match="as a shell lists names, .*step-200.pt to .*step-1000.pt"):
        record = merge(listed, output=tmp_path / "o.pt", schedule="ema:0.9")
    by_number = [str(run / f"step-{step}.pt") for step in (200, 900, 1000)]
    assert [one.path for one in record.inputs] == by_number
    with pytest.warns(UserWarning, match="as a shell lists names"):
        record = merge(listed, output=tmp_path / "o.pt", last=1)
    assert [one.path for one in record.inputs] == by_number[-1:]
    # Another order is meant, and so is one that weights or steps were given for.
    for paths, given in (
        (listed[::-1], {"schedule": "ema:0.9"}),
        (listed, {"weights": [0.2, 0.3, 0.5]}),
        (listed, {"schedule": "power:0.1", "steps": [1, 2, 3]}),
        ([run / "step-200.pt", run / "step-1000.pt"], {}),
    ):
        record = merge(paths, output=tmp_path / "o.pt", **given)
        assert [one.path for one in record.inputs] == list(map(str, paths))


def test_numbers_that_tell_no_order_leave_the_given_one(tmp_path: Path) -> None:
    for names in (["seed-1/step-5", "seed-10/step-5", "seed-2/step-5"], ["w-0.05", "w-0.1"]):
        paths = []
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            paths.append(save({"w": torch.ones(1)}, path, "torch"))
        if names[0] == "w-0.05":
            assert chosen(paths) == paths
    with pytest.warns(UserWarning, match="seed-1/step-5 to .*seed-10/step-5"):
        chosen([tmp_path / name for name in ("seed-1/step-5", "seed-10/step-5", "seed-2/step-5")])


def test_the_last_model_beside_a_run_s_checkpoints_is_told_apart(tmp_path: Path) -> None:
    run = save(state(1), tmp_path / "run", "folder")  # as a Trainer writes it at the end
    for step in (500, 1000):
        save(state(step), run / f"checkpoint-{step}", "sharded")
    with pytest.warns(UserWarning, match="last is 8, and there are 2"):
        record = merge(run, output=tmp_path / "out", last=8)
    assert [Path(one.path).name for one in record.inputs] == ["checkpoint-500", "checkpoint-1000"]
    with pytest.warns(UserWarning) as told:
        record = merge(run, output=tmp_path / "alone")
    assert [one.path for one in record.inputs] == [str(run)]
    texts = [str(one.message) for one in told]
    assert any("it also holds 2 more, as checkpoint-1000: --last N" in text for text in texts)
    assert any("weights of their own: checkpoint-1000, checkpoint-500" in text for text in texts)
    assert record.carried_over == ("config.json",)


def test_a_pipeline_of_several_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for name in ("text_encoder", "text_encoder_2", "unet"):
        save(state(1), tmp_path / "pipeline" / name, "folder")
    with pytest.raises(ValueError, match="pipeline of several models; pass the folders of one"):
        merge([tmp_path / "pipeline"] * 2, output=tmp_path / "out")


def test_snapshots_of_two_widths_are_no_list(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    ema = ema_fused.PowerFunctionEMA(model)
    for _ in range(2):
        ema.update_parameters(model)
        ema.save_snapshot(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"several checkpoints of one step \(snapshot-0+1-0.05.saf"
    ):
        merge(tmp_path / "run", output=tmp_path / "o.pt")
    merge(sorted((tmp_path / "run").glob("*-0.1.*")), output=tmp_path / "o.pt")
