"""Averages of the original packages are read, and read back by them, and go on in the same way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.converting import convert, read_average
from ema_fused.converting.average_state import whole
from tests.converting.originals_of_averages import (
    ALL,
    DECAY,
    Diffusers,
    Lightning,
    Mmcv,
    Mmengine,
    Original,
    Tensors,
    copied,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

STEPS, MORE = range(4), range(4, 8)
originals = pytest.mark.parametrize("original", ALL, ids=lambda one: one.format)


def made(original: Any, net: nn.Module | None = None) -> Any:
    """An average of some steps; without its package, the test is left out."""
    try:
        return original(net).run(STEPS)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))


def saved(their: Original, folder: Path) -> Path:
    path = folder / f"theirs{their.suffix}"
    their.save(path)
    return path


def ours_of(their: Original, net: nn.Module) -> AveragedWeights:
    return AveragedWeights(net, momentum=their.momentum, arithmetic=their.arithmetic)


def names_for(their: Original) -> list[str]:
    return [name for name, _ in their.net.named_parameters()]


def plain(their: Original, tensors: Any) -> Tensors:
    """Without what Lightning calls the model in it, and mmcv's buffers."""
    found = {name: whole(tensor) for name, tensor in tensors.items()}
    if isinstance(their, Lightning):
        return {name.removeprefix("net."): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in found.items() if not name.startswith("ema_")}


def assert_same(found: Tensors, expected: Tensors, *, exact: bool = True) -> None:
    assert found.keys() >= expected.keys() and expected
    for name, tensor in expected.items():
        if exact:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=3e-7, atol=3e-8)


@originals
def test_what_is_read_is_what_the_original_holds(original: Any, tmp_path: Path) -> None:
    their = made(original)
    path = saved(their, tmp_path)
    state = read_average(path, names=names_for(their), **their.loading)
    assert state.format == their.format
    assert_same(plain(their, state.averaged), their.averages())
    expected = None
    if their.keeps_steps:
        expected = len(STEPS) + (their.format == "torch-ema")
    assert state.steps == expected
    assert (state.raw is not None) == their.keeps_raw
    if state.raw is not None:
        raw = {name: one for name, one in their.net.state_dict().items() if "ema_" not in name}
        assert_same(plain(their, state.raw), copied(raw))
    if their.format in ("torch-ema", "diffusers", "diffusers-list"):
        assert state.decay == DECAY and state.warm_up is not None


@originals
def test_ours_goes_on_as_the_original_does(original: Any, tmp_path: Path) -> None:
    their = made(original)
    path = saved(their, tmp_path)
    net = copy.deepcopy(their.net)
    for name in [name for name in net._buffers if name.startswith("ema_")]:
        del net._buffers[name]
    our: Any = ours_of(their, net)
    if isinstance(their, Lightning):
        net = nn.ModuleDict({"net": net})
        our = ours_of(their, net)
    steps = None if their.keeps_steps else len(STEPS)
    done = our.load_state_from(path, steps=steps, **their.loading)
    assert done.format == their.format and done.steps == int(our.steps)
    assert_same(plain(their, our.weights), their.averages())
    their.run(MORE)
    for step in MORE:
        train(net["net"] if isinstance(their, Lightning) else net, step)
        our.update_parameters(net)
    ours = plain(their, our.weights)
    expected = {
        name: tensor for name, tensor in their.averages().items() if name in names_for(their)
    }
    assert_same(ours, expected, exact=their.is_exact)


@originals
def test_the_original_goes_on_from_ours(original: Any, tmp_path: Path) -> None:
    their = made(original)
    net = copy.deepcopy(their.net)
    if isinstance(their, Lightning):
        net = nn.ModuleDict({"net": net})
    for name in [name for name in net._buffers if name.startswith("ema_")]:
        del net._buffers[name]
    our = ours_of(their, net)
    our.load_state_from(saved(their, tmp_path), steps=len(STEPS) + 1, **their.loading)
    if their.keeps_steps and their.format != "torch-ema":
        our.steps.fill_(len(STEPS))
    torch.save({"model": net.state_dict(), "averaged": our.state_dict()}, tmp_path / "ours.pt")
    folder = tmp_path / "model"
    if isinstance(their, Diffusers):
        their.net.save_config(folder)
    output = tmp_path / f"converted{their.suffix}"
    done = convert(
        tmp_path / "ours.pt",
        their.format,
        output,
        decay=DECAY,
        names=names_for(their) if "list" in their.format or their.format == "torch-ema" else None,
        folder=folder,
    )
    assert (done.source, done.target) == ("ema_fused", their.format)
    other = original() if isinstance(their, (Diffusers, Lightning)) else original(_copy(their))
    other.net.load_state_dict(
        {name: one for name, one in their.net.state_dict().items() if "ema_" not in name},
        strict=False,
    )
    other.load(output)
    assert_same(other.averages(), their.averages())
    if isinstance(their, Diffusers):
        # Ours has no warm-up to tell of: min_decay says that there is none.
        assert other.ema.min_decay == other.ema.decay == DECAY
        return
    if their.format == "diffusers-list":
        other.ema.min_decay = 0.0
    other.run(MORE)
    their.run(MORE)
    assert_same(other.averages(), their.averages())


def _copy(their: Original) -> nn.Module:
    net = copy.deepcopy(their.net)
    for name in [name for name in net._buffers if name.startswith("ema_")]:
        del net._buffers[name]
    return net


@originals
def test_a_round_trip_ends_equal_to_the_bit(original: Any, tmp_path: Path) -> None:
    their = made(original)
    path = saved(their, tmp_path)
    if isinstance(their, Diffusers):
        their.net.save_config(tmp_path / "model")
    settings = {"names": names_for(their), "folder": tmp_path / "model"}
    first = tmp_path / f"again{their.suffix}"
    # By ours, and once more, so that what one of the two makes up can be told from what it keeps.
    convert(path, "ema_fused", tmp_path / "ours.safetensors", **settings, **their.loading)
    before = read_average(path, names=settings["names"], **their.loading)
    raw = None
    if before.raw is not None:
        raw = tmp_path / "raw.pt"
        torch.save({name: whole(tensor) for name, tensor in before.raw.items()}, raw)
    convert(
        tmp_path / "ours.safetensors",
        their.format,
        first,
        decay=before.decay,
        raw=raw,
        **settings,
    )
    after = read_average(first, names=settings["names"])
    assert after.format == their.format and after.steps == (
        before.steps if their.keeps_steps else None
    )
    assert after.decay == before.decay
    assert after.averaged.keys() == before.averaged.keys()
    for mine, own in ((after.averaged, before.averaged), (after.raw or {}, before.raw or {})):
        assert mine.keys() == own.keys()
        for name in own:
            assert torch.equal(whole(mine[name]), whole(own[name])), name


def test_settings_of_diffusers_and_torch_ema_go_from_one_to_the_other(tmp_path: Path) -> None:
    pytest.importorskip("torch_ema")
    from torch_ema import ExponentialMovingAverage as TorchEma

    net = nn.Linear(3, 2)
    theirs = TorchEma(net.parameters(), decay=0.95)
    for step in range(30):
        train(net, step)
        theirs.update()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", "diffusers-list", tmp_path / "list.pt")
    convert(tmp_path / "list.pt", "torch-ema", tmp_path / "back.pt")
    before, after = (torch.load(tmp_path / name) for name in ("theirs.pt", "back.pt"))
    assert (after["decay"], after["num_updates"]) == (0.95, 30)
    for own, mine in zip(before["shadow_params"], after["shadow_params"], strict=True):
        assert torch.equal(own, mine)
    diffusers = pytest.importorskip("diffusers.training_utils")
    other = diffusers.EMAModel(net.parameters(), foreach=True)
    other.load_state_dict(torch.load(tmp_path / "list.pt"))
    train(net, 30)
    theirs.update()
    other.step(net.parameters())
    for own, mine in zip(theirs.shadow_params, other.shadow_params, strict=True):
        torch.testing.assert_close(own, mine, rtol=3e-7, atol=3e-8)


def test_ours_into_mmengine_that_never_was_there(tmp_path: Path) -> None:
    """A run changes from our average to mmengine's hook; both go on with the same numbers."""
    pytest.importorskip("mmengine")
    net = Mmengine().net
    our = ExponentialMovingAverage(net, momentum=1 - DECAY)
    for step in STEPS:
        train(net, step)
        our.update_parameters(net)
    torch.save({"model": net.state_dict(), "ema": our.state_dict()}, tmp_path / "ours.pt")
    convert(tmp_path / "ours.pt", "mmengine", tmp_path / "theirs.pth")
    their = Mmengine(copy.deepcopy(net))
    their.load(tmp_path / "theirs.pth")
    for step in MORE:
        train(net, step)
        our.update_parameters(net)
    their.run(MORE)
    assert_same(their.averages(), copied(our.module.state_dict()))
    assert int(their.hook.ema_model.steps) == int(our.steps)


@pytest.mark.parametrize("name", ["epoch_1.pth", "iter_4.pth"])
def test_mmcv_says_where_the_averages_are_by_its_last_checkpoint(name: str, tmp_path: Path) -> None:
    their = made(Mmcv)
    checkpoint = their.checkpoint()
    if name.startswith("iter"):
        checkpoint["state_dict"] = their.net.state_dict()  # nothing was exchanged
        checkpoint["meta"]["iter"] -= 1  # and the iteration isn't counted yet
    torch.save(checkpoint, tmp_path / "unknown.pth")
    with pytest.raises(ValueError, match="doesn't say where its averages are"):
        read_average(tmp_path / "unknown.pth")
    checkpoint["meta"]["hook_msgs"] = {"last_ckpt": f"/runs/a/{name}"}
    torch.save(checkpoint, tmp_path / "told.pth")
    found = read_average(tmp_path / "told.pth")
    assert_same(plain(their, found.averaged), their.averages())
    assert found.steps == len(STEPS)
