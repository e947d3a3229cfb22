"""PowerFunctionEMA of a part of the weights, or of buffers too, and its snapshots."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_fused import PowerFunctionEMA
from ema_fused.cli import main
from ema_fused.posthoc import reconstruct
from tests.averages.left_out import HEAD
from tests.networks import Tied, conv_net, differences, generator, snapshot, train

WIDTHS = (0.05, 0.10)
NORM = {"norm.running_mean", "norm.running_var"}


def is_of_the_head(name: str, tensor: Tensor) -> bool:
    return name.startswith("head.") and tensor.numel() > 0


CHOICES: list[dict[str, Any]] = [
    {"exclude": "head"},
    {"exclude": is_of_the_head},
    {"include": [r"^conv\.", "norm", "hidden"]},
    {"include": "norm|hidden|conv|head", "exclude": r"^head\."},
]


def run(
    model: nn.Module, *averages: PowerFunctionEMA, steps: int = 8, folders: tuple[Path, ...] = ()
) -> None:
    random = generator()
    for _ in range(steps):
        train(model, random)
        for average in averages:
            average.update_parameters(model)
        for average, folder in zip(averages, folders, strict=len(folders) > 0):
            average.save_snapshot(folder)


def expect_shared(ema: PowerFunctionEMA, model: nn.Module, names: set[str]) -> None:
    own = dict(model.named_parameters())
    for width in ema.sigma_rel:
        ours = ema.average(width)
        shared = {name for name in own if ours[name].data_ptr() == own[name].data_ptr()}
        assert shared == names == set(ema.left_out_names)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice))
def test_the_rest_is_averaged_as_ever(choice: dict[str, Any]) -> None:
    model = conv_net()
    ema, whole = PowerFunctionEMA(model, WIDTHS, **choice), PowerFunctionEMA(model, WIDTHS)
    run(model, ema, whole)
    expect_shared(ema, model, HEAD)
    assert "left_out=2: head.weight, head.bias" in repr(ema)
    for width in WIDTHS:
        assert set(differences(ema.average(width), whole.average(width))) == HEAD
    keys = set(whole.state_dict()) - set(ema.state_dict())
    assert keys == {f"averages.{i}.{name}" for i in range(2) for name in HEAD}


def test_what_is_left_out_is_what_the_model_has_now() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model, WIDTHS, exclude="head")
    run(model, ema)
    model.head.weight.data = model.head.weight.data.clone() * 2  # moved
    ema.update_parameters(model)
    expect_shared(ema, model, HEAD)
    model.head.bias = nn.Parameter(torch.ones(31))  # replaced
    ema.update_parameters(model)
    expect_shared(ema, model, HEAD)
    own = snapshot(model)
    with ema.swapped(model, sigma_rel=0.1):
        inside = snapshot(model)
    assert differences(snapshot(model), own) == []
    written = set(differences(inside, own))
    assert "hidden.weight" in written and not written & HEAD
    ema.copy_to(model, sigma_rel=0.1)
    assert differences(snapshot(model), inside) == []
    expect_shared(ema, model, HEAD)
    other = conv_net(seed=5)
    ema.copy_to(other, sigma_rel=0.1)
    assert differences(snapshot(other), inside) == []
    with torch.no_grad():
        other.head.weight.zero_()
    assert model.head.weight.count_nonzero() > 0  # that of the other is its own


def test_tied_weights_are_left_out_together() -> None:
    model = nn.Sequential(Tied(), nn.Linear(4, 2))
    ema = PowerFunctionEMA(model, exclude=r"coder\.weight")
    assert set(ema.left_out_names) == {"0.encoder.weight", "0.decoder.weight"}
    ema.update_parameters(model)
    average = ema.averages[0]
    assert average.get_submodule("0.encoder").weight is average.get_submodule("0.decoder").weight
    with pytest.raises(ValueError, match=r"are one tensor \(tied\)"):
        PowerFunctionEMA(model, exclude="encoder")


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"exclude": "haed"}, "exclude: 'haed' is found in the name of no parameter"),
        ({"include": "running_mean"}, "but of buffers: norm.running_mean"),
        ({"exclude": "."}, "leaves out every parameter"),
        ({"update_buffers": "runing"}, "update_buffers: 'runing' is found in the name of no buf"),
        ({"include": "("}, "include: '\\(' is no regular expression"),
    ],
)
def test_patterns_that_name_nothing_are_refused(choice: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PowerFunctionEMA(conv_net(), **choice)


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model, WIDTHS, exclude="head")
    run(model, ema)
    saved = copy.deepcopy(ema.state_dict())
    again = PowerFunctionEMA(model, WIDTHS, exclude="head")
    again.load_state_dict(saved)
    run(model, ema, again, steps=3)
    assert differences(snapshot(again), snapshot(ema)) == []
    expect_shared(again, model, HEAD)
    # A state of all parameters: what is left out stays the model's.
    whole = PowerFunctionEMA(model, WIDTHS)
    run(model, whole, steps=2)
    own = model.head.weight.clone()
    again.load_state_dict(whole.state_dict())
    assert torch.equal(model.head.weight, own)
    assert torch.equal(again.average(0.05)["hidden.weight"], whole.average(0.05)["hidden.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        whole.load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_stand_alone_until_their_next_update(copied: Callable[[Any], Any]) -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model, WIDTHS, exclude="head")
    run(model, ema)
    then = {name: tensor.clone() for name, tensor in ema.average(0.05).items()}
    other = copied(ema)
    run(model, ema, steps=1)
    assert differences(other.average(0.05), then) == []
    run(model, other, steps=1)
    expect_shared(other, model, HEAD)


def test_a_changed_model_is_taken_over() -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model, WIDTHS, exclude="head", update_buffers="running_")
    run(model, ema)
    kept = {width: ema.average(width)["hidden.weight"].clone() for width in WIDTHS}
    model.head = nn.Linear(67, 9)
    ema.adopt(model, resize=lambda name, old, new: pytest.fail(f"resized {name}"))
    expect_shared(ema, model, HEAD)
    assert all(torch.equal(ema.average(w)["hidden.weight"], one) for w, one in kept.items())


# Buffers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", [True, "running_", ["mean", "var"]])
def test_chosen_buffers_are_averaged(choice: Any, dtype: torch.dtype) -> None:
    model = conv_net(dtype=dtype)
    ema = PowerFunctionEMA(model, WIDTHS, update_buffers=choice)
    # The same tensors as parameters.
    twins = nn.ParameterDict(
        {name.replace(".", "_"): tensor.clone() for name, tensor in of_the_norm(model).items()}
    )
    expected = PowerFunctionEMA(twins, WIDTHS)
    random = generator()
    for _ in range(6):
        train(model, random)
        with torch.no_grad():
            for name, tensor in of_the_norm(model).items():
                twins[name.replace(".", "_")].copy_(tensor)
        ema.update_parameters(model)
        expected.update_parameters(twins)
    for width in WIDTHS:
        for name, tensor in of_the_norm(ema.averages[WIDTHS.index(width)]).items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected.average(width)[name.replace(".", "_")]), name
        count = ema.average(width)["norm.num_batches_tracked"]
        assert torch.equal(count, model.norm.num_batches_tracked)


def of_the_norm(model: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in model.named_buffers() if name in NORM}


# Snapshots.


def test_a_reconstruction_is_of_what_was_averaged(tmp_path: Path, capsys: Any) -> None:
    model = conv_net()
    folders = tmp_path / "part", tmp_path / "whole"
    part = PowerFunctionEMA(model, WIDTHS, exclude="head", update_buffers="running_")
    whole = PowerFunctionEMA(model, WIDTHS, update_buffers="running_")
    run(model, part, whole, folders=folders)
    found, expected = (reconstruct(folder, 0.07) for folder in folders)
    assert expected.keys() - found.keys() == HEAD
    assert differences(found, {name: expected[name] for name in found}) == []
    assert not torch.equal(found["norm.running_mean"], model.norm.running_mean)
    own = model.head.weight.clone()
    missing = model.load_state_dict(found, strict=False)
    assert set(missing.missing_keys) == HEAD and not missing.unexpected_keys
    assert torch.equal(model.head.weight, own)
    kept = load_file(sorted(folders[0].glob("*.safetensors"))[0])
    assert not HEAD & kept.keys() and "hidden.weight" in kept
    output = tmp_path / "made.safetensors"
    command = ["reconstruct", str(folders[0]), "--sigma-rel", "0.07", "-o", str(output)]
    assert main(command) == 0
    told = "2 parameters that weren't averaged aren't in it: head.weight, head.bias"
    assert told in capsys.readouterr().out
    assert differences(load_file(output), found) == []


def test_a_buffer_is_averaged_in_a_reconstruction_only_where_it_is_chosen(tmp_path: Path) -> None:
    model = conv_net()
    chosen = PowerFunctionEMA(model, WIDTHS, update_buffers="running_mean")
    run(model, chosen, folders=(tmp_path,))
    found = reconstruct(tmp_path, 0.07)
    assert torch.equal(found["norm.running_var"], model.norm.running_var)
    for width in WIDTHS:  # what is kept comes out as it was saved
        mean = reconstruct(tmp_path, width)["norm.running_mean"]
        torch.testing.assert_close(mean, chosen.average(width)["norm.running_mean"])
    narrow, wide = (chosen.average(width)["norm.running_mean"] for width in WIDTHS)
    assert (narrow - wide).abs().max() > 1e-3


def test_snapshots_of_other_choices_are_told_apart(tmp_path: Path) -> None:
    model = conv_net()
    ema = PowerFunctionEMA(model, WIDTHS)
    run(model, ema)
    ema.save_snapshot(tmp_path)
    part = PowerFunctionEMA(model, WIDTHS, exclude="head.bias")
    run(model, part, steps=2)
    part.save_snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"averages: 'head\.bias' is averaged in one of them"):
        reconstruct(tmp_path, 0.07)
