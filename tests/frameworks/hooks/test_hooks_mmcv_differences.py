"""Where our hooks differ from mmcv's and mmdet 2's on purpose: the original's behaviour, then ours.

And what they refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused.engine import backends
from ema_fused.hooks import registered_averages
from ema_fused.hooks.registered_averages import RegisteredAverages
from tests.frameworks.hooks.mmcv_runs import (
    BATCHES,
    OURS,
    SIDES,
    THEIRS,
    Call,
    Moment,
    Net,
    assert_same,
    net,
    run,
    run_both,
)
from tests.networks import differences, snapshot

needs_native_kernel = pytest.mark.skipif(
    backends.why_not("cpu") is not None or backends.pinned(None) == "foreach",
    reason="torch's foreach functions swap with a temporary, and don't see overlaps",
)
pytestmark = pytest.mark.filterwarnings("ignore:This overload of add_ is deprecated")

# Prepared once, and nothing copied.


def test_one_plan_serves_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = registered_averages.Plan

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(registered_averages, "Plan", counted)
    at_first: list[int] = []
    run(OURS.ExpMomentumEMAHook(), Call(lambda _: at_first.append(len(made)), at=0), epochs=13)
    assert at_first == [len(made)] != [0]


@needs_native_kernel
@pytest.mark.parametrize(("hooks", "clones"), [(THEIRS, 11), (OURS, 0)], ids=["theirs", "ours"])
def test_the_swap_is_in_place_and_copies_no_tensor_where_theirs_does(
    hooks: Any, clones: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hook = net(), hooks.BaseEMAHook(0.1)
    run(hook, model=model, epochs=1)
    before = snapshot(model)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    cloned: list[Tensor] = []
    clone = Tensor.clone
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "clone", lambda tensor: cloned.append(tensor) or clone(tensor))
        hook.before_train_epoch(None)
    assert "conv.weight" in differences(snapshot(model), before)
    hook.after_train_epoch(None)
    assert differences(snapshot(model), before) == []
    assert addresses == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert len(cloned) == clones


# What can't be averaged is refused.


@pytest.mark.parametrize(
    ("hook", "arguments", "error", "message"),
    [
        ("EMAHook", {"momentum": 0.0}, ValueError, r"momentum is 0\.0; a number in \(0, 1\)"),
        ("EMAHook", {"momentum": "0.1"}, TypeError, r"momentum is '0\.1'; a number in \(0, 1\)"),
        ("BaseEMAHook", {"momentum": 1.0}, ValueError, r"momentum is 1\.0; a number in \(0, 1\)"),
        ("BaseEMAHook", {"momentum": math.nan}, ValueError, r"momentum is nan; a number in"),
        ("EMAHook", {"interval": 0}, ValueError, "interval is 0; at least 1 is expected"),
        ("BaseEMAHook", {"interval": 1.5}, TypeError, r"interval is 1\.5; an integer is expected"),
        ("EMAHook", {"warm_up": -1}, ValueError, "warm_up is -1; a finite number, 0 or more,"),
        ("LinearMomentumEMAHook", {"warm_up": None}, TypeError, "warm_up is None; a finite"),
        (
            "BaseEMAHook",
            {"momentum_fun": 0.5},
            TypeError,
            "momentum_fun is 0.5; None or",
        ),
        ("ExpMomentumEMAHook", {"total_iter": 0}, ValueError, "total_iter is 0; a finite number"),
    ],
)
def test_arguments_out_of_range_are_refused(
    hook: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(OURS, hook)(**arguments)


def test_a_momentum_fun_out_of_range_is_refused_and_changes_nothing() -> None:
    model = net()
    before: list[dict[str, Tensor]] = []
    hooks = [
        OURS.BaseEMAHook(momentum_fun=lambda step: 1.2 if step == 5 else 0.1),
        Call(lambda runner: before.append(snapshot(runner.model)), at=5),
    ]
    with pytest.raises(ValueError, match=r"momentum is 1\.2; a number in \[0, 1\] is expected"):
        run(*hooks, model=model)
    changed = differences(snapshot(model), before[0])
    assert "conv.weight" in changed  # the optimizer had made its step
    assert not [name for name in changed if name.startswith("ema_")]


# Following the tensors.


def replace_parameters(runner: Any) -> None:
    """New objects of the same values, in the optimizer too."""
    group = runner.optimizer.param_groups[0]
    for module in runner.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            new = nn.Parameter(parameter.detach().clone())
            setattr(module, name, new)
            group["params"] = [new if one is parameter else one for one in group["params"]]


def replace_storage(runner: Any) -> None:
    for parameter in runner.model.parameters():
        parameter.data = parameter.data.clone()


def convert(runner: Any) -> None:
    runner.model.double()


def averages_by_hand(moments: list[Moment], momentum: float) -> list[dict[str, Tensor]]:
    """After each iteration the averages of what the model was, in the original's arithmetic."""
    names = [
        name for name in moments[0].tensors if f"ema_{name.replace('.', '_')}" in moments[0][2]
    ]
    averages = {name: net().state_dict()[name] for name in names}
    by_hand = []
    for moment in moments:
        for name in names:
            raw = moment.tensors[name]
            average = averages[name].to(raw.dtype)
            average = average.mul(1 - momentum).add_(raw, alpha=momentum)
            averages[name] = average if raw.is_floating_point() else raw
        by_hand.append({f"ema_{name.replace('.', '_')}": a for name, a in averages.items()})
    return by_hand


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("change", [replace_parameters, replace_storage, convert])
def test_replaced_tensors_are_followed_where_theirs_go_stale(
    change: Callable[[Any], None], side: str
) -> None:
    done = run(SIDES[side].BaseEMAHook(0.1), Call(change, at=5), momentum=0.0, epochs=2)
    trained = [moment for moment in done.moments if moment.stage == "trained"]
    expected = averages_by_hand(trained, 0.1)
    right = [
        not differences({name: moment.tensors[name] for name in averages}, averages)
        for moment, averages in zip(trained, expected, strict=True)
    ]
    raw, averaged = trained[-1].tensors["conv.weight"], expected[-1]["ema_conv_weight"]
    saved = done.of("epoch ended")[-1]["conv.weight"]
    if side == "ours":
        assert all(right)
        assert torch.equal(saved, averaged)
    else:
        assert not torch.equal(trained[-1].tensors["ema_conv_weight"], averaged)
        assert torch.equal(saved, raw)  # the model's own weights are evaluated and saved


def test_a_part_of_the_model_that_is_converted_keeps_its_average() -> None:
    model = net()
    averages = RegisteredAverages(model, skip_buffers=True)
    model.head.double()
    raw = snapshot(model.head)
    with torch.no_grad():
        model.head.weight.add_(1e-12)  # too small a step for float32
    averages.average_(0.5)
    averages.put_in()
    assert model.head.weight.dtype == model.get_buffer("ema_head_weight").dtype == torch.float64
    assert torch.equal(model.head.weight, raw["weight"] * 0.5 + (raw["weight"] + 1e-12) * 0.5)
    averages.take_out()
    assert torch.equal(model.head.weight, raw["weight"] + 1e-12)


@pytest.mark.parametrize("write", ["put_in", "take_out"])
def test_torch_knows_that_the_model_was_written_where_theirs_hides_it(write: str) -> None:
    model = net().eval()
    averages = RegisteredAverages(model, skip_buffers=True)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    images = torch.rand(3, *model.conv.weight.shape[1:2], 6, 6)
    if write == "take_out":
        averages.put_in()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(images)
        getattr(averages, write)()
        after = model(images)
    assert not torch.equal(before, after)  # no cast of the weights before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()


def test_a_parameter_in_another_dtype_is_swapped_all_the_same() -> None:
    """Nothing has been averaged since: the swap is what comes upon it first."""
    model = net()
    averages = RegisteredAverages(model, skip_buffers=True)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    raw = model.head.weight.detach().clone()
    model.head.weight.data = model.head.weight.data.double()
    averages.put_in()
    assert torch.equal(model.head.weight, net().head.weight.double())
    averages.take_out()
    assert torch.equal(model.head.weight, raw.double())


def test_another_shape_is_refused() -> None:
    def resize(runner: Any) -> None:
        runner.model.extra = nn.Parameter(torch.zeros(4))

    model = net()
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"'extra': .* has shape \(3,\) and the source \(4,\)"):
        run(OURS.BaseEMAHook(0.1), Call(resize, at=3), model=model)


def test_a_parameter_that_comes_later_is_averaged_from_then_on() -> None:
    def grow(runner: Any) -> None:
        runner.model.extra = nn.Parameter(torch.full((3,), 7.0))

    assert "ema_extra" in run(OURS.BaseEMAHook(0.1), Call(grow, at=3), epochs=1).end


def test_a_parameter_that_is_lost_is_named() -> None:
    def shrink(runner: Any) -> None:
        del runner.model.scale

    with pytest.raises(KeyError, match="the model has lost scale, which are averaged"):
        run(OURS.BaseEMAHook(0.1), Call(shrink, at=3), model=Unscaled())


# Names and integers.


class Unscaled(Net):
    """Its own buffer isn't used."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(self.norm(self.conv(images)).mean((2, 3))))


class Tied(Net):
    """A second layer with the first one's weight, and a bias of its own that isn't trained."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Conv2d(1, 5, 3)
        self.copy.weight = self.conv.weight


class SameName(Net):
    """``conv.bias`` and ``conv_bias``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_bias = nn.Parameter(torch.full((5,), 9.0))


class TakenName(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema_conv_bias", torch.full((5,), 9.0))


@pytest.mark.parametrize("interval", [1, 3])  # 3: not at the end of an epoch
def test_integers_are_current_in_evaluation_where_theirs_stay_behind(interval: int) -> None:
    ours, theirs = run_both("BaseEMAHook", {"interval": interval})
    name = "norm.num_batches_tracked"
    at_the_ends = [BATCHES, 2 * BATCHES, 3 * BATCHES]
    for run_of, expected in ((ours, at_the_ends), (theirs, [0, 0, 0])):
        assert [int(tensors[name]) for tensors in run_of.of("epoch ended")] == expected
        assert [int(tensors[name]) for tensors in run_of.of("evaluated")[::BATCHES]] == expected
        assert [int(tensors[name]) for tensors in run_of.of("trained")] == list(range(1, 25))


def test_tied_weights_come_back_where_theirs_are_lost() -> None:
    for side, hooks in (("theirs", THEIRS), ("ours", OURS)):
        torch.manual_seed(0)
        back: list[dict[str, Tensor]] = []
        put_down = Call(lambda runner, back=back: back.append(snapshot(runner.model)), at=BATCHES)
        done = run(hooks.BaseEMAHook(0.1), put_down, model=Tied())
        state = done.model.state_dict()
        assert torch.equal(state["ema_conv_weight"], state["ema_copy_weight"]) == (side == "ours")
        raw = done.of("trained")[BATCHES - 1]["conv.weight"]
        averaged = done.of("evaluated")[0]["conv.weight"]
        assert not torch.equal(raw, averaged)
        assert torch.equal(back[0]["conv.weight"], raw if side == "ours" else averaged)


class OneMemory(Net):
    """Two parameters over the same elements: not one object, as tied weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Conv2d(1, 5, 3)
        self.copy.weight.data = self.conv.weight.data


@needs_native_kernel
def test_two_parameters_in_one_memory_are_refused_where_theirs_lose_their_weights() -> None:
    back: list[dict[str, Tensor]] = []
    put_down = Call(lambda runner: back.append(snapshot(runner.model)), at=BATCHES)
    theirs = run(THEIRS.EMAHook(0.1), put_down, model=OneMemory())
    assert torch.equal(back[0]["conv.weight"], theirs.of("evaluated")[0]["conv.weight"])
    with pytest.raises(ValueError, match=r"'copy\.weight' and 'conv\.weight': source tensors ov"):
        run(OURS.EMAHook(0.1), model=OneMemory())
    assert run(OURS.EMAHook(0.1), model=OneMemory(), kind="iter").moments  # nothing is swapped


def test_two_names_that_become_one_are_refused_where_theirs_are_mixed() -> None:
    theirs = run(THEIRS.BaseEMAHook(0.1), model=SameName()).end
    assert theirs["conv.bias"].min() > 3.0  # an average of both, of which one is 9
    with pytest.raises(ValueError, match=r"'conv_bias' and 'conv\.bias' would both be called"):
        run(OURS.BaseEMAHook(0.1), model=SameName())


def test_a_name_that_the_model_has_is_refused_where_theirs_overwrites_it() -> None:
    model = TakenName()
    run(THEIRS.EMAHook(0.1), model=model, epochs=1)
    assert model.ema_conv_bias.max() < 9.0
    model = TakenName()
    with pytest.raises(
        ValueError, match=r"the average of 'conv\.bias' would be called 'ema_conv_bias', and the m"
    ):
        run(OURS.EMAHook(0.1), model=model)
    assert list(model.state_dict()) == list(TakenName().state_dict())
    assert model.ema_conv_bias.eq(9.0).all()


def test_a_second_run_averages_the_model_where_theirs_averages_its_averages_too() -> None:
    models = {"ours": net(), "theirs": net()}
    for side, hooks in (("ours", OURS), ("theirs", THEIRS)):
        for _ in range(2):
            run(hooks.BaseEMAHook(0.1), model=models[side])
    names = set(models["theirs"].state_dict()) - set(models["ours"].state_dict())
    assert names == {
        f"ema_{name.replace('.', '_')}" for name in models["ours"].state_dict() if "ema" in name
    }
    assert "ema_ema_conv_weight" in names
    with pytest.raises(ValueError, match=r"if another run has left it there: del model\.ema_"):
        run(OURS.BaseEMAHook(0.1), model=models["theirs"])
    # Parameters alone: theirs begins anew as well, and both have the same bits.
    models = {"ours": net(), "theirs": net()}
    for _ in range(2):
        runs = [run(hooks.EMAHook(0.5), model=models[side]) for side, hooks in SIDES.items()]
        assert_same(*runs)


@pytest.mark.parametrize("name", ["EMAHook", "BaseEMAHook"])
def test_averages_begin_at_a_checkpoint_without_any_where_theirs_begin_before_it(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(model=net(seed=3), epochs=1, work_dir=tmp_path)
    path = str(tmp_path / "epoch_1.pth")
    saved = torch.load(path)["state_dict"]
    for side, hooks in SIDES.items():
        model = net(seed=4)
        hook = getattr(hooks, name)(0.1, resume_from=path)
        at_first = snapshot(model)
        caplog.clear()
        began: list[dict[str, Tensor]] = []
        run(hook, Call(lambda _, b=began, m=model: b.append(snapshot(m)), at=BATCHES), model=model)
        (found,) = began
        # After the swap that begins an epoch: what is trained, and what its average is.
        trained, average = found["conv.weight"], found["ema_conv_weight"]
        assert torch.equal(average, saved["conv.weight"])
        if side == "ours":
            assert torch.equal(trained, saved["conv.weight"])
            told = [r.getMessage() for r in caplog.records if "no averages" in r.getMessage()]
            assert told == [
                f"{path} has no averages (ema_*), so they begin here, with the weights that it has"
            ]
        else:  # what was loaded is taken for the average of what was there before
            assert torch.equal(trained, at_first["conv.weight"])
