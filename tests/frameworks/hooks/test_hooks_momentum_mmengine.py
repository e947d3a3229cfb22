"""``MomentumUpdateHook`` under mmengine's runners, beside MMSelfSup's own hook and update.

The original is made for the runners of mmcv 1.x: here it is called with a view of mmengine's.
"""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ema_fused import SlowPathWarning
from ema_fused.hooks.mmengine import BYOLHook, MomentumUpdateHook
from tests.frameworks.hooks import mmengine_runs as runs
from tests.frameworks.hooks.ema_hooks import QUIET
from tests.frameworks.originals import import_mmcv, original
from tests.networks import conv_net, differences, generator, snapshot, train

pytestmark = QUIET

_SELFSUP = "mmselfsup==0.11.0"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_mmcv()
    _ALGORITHMS = "mmselfsup.models.algorithms"
    Original = original(_SELFSUP, "mmselfsup.core.hooks.momentum_update_hook").MomentumUpdateHook
    BYOL = original(_SELFSUP, f"{_ALGORITHMS}.byol").BYOL
    MOCO_V3 = original(_SELFSUP, f"{_ALGORITHMS}.mocov3").MoCoV3
    CAE = original(_SELFSUP, f"{_ALGORITHMS}.cae").CAE
# The networks that momentum_update() of each averages: target, online.
ALGORITHMS = {
    BYOL: ("target_net", "online_net"),
    MOCO_V3: ("momentum_encoder", "base_encoder"),
    CAE: ("teacher", "backbone"),
}


class Theirs(Hook):  # type: ignore[misc]
    """The original hook: it sees a runner of mmcv's, whose model is always wrapped."""

    def __init__(self, **arguments: Any) -> None:
        self.hook = Original(**arguments)

    @staticmethod
    def view_of(runner: Any) -> Any:
        model = getattr(runner.model, "module", runner.model)
        wrapped = SimpleNamespace(module=model, momentum_update=model.momentum_update)
        return SimpleNamespace(iter=runner.iter, max_iters=runner.max_iters, model=wrapped)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.hook.before_train_iter(self.view_of(runner))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.hook.after_train_iter(self.view_of(runner))


class Algorithm(BaseModel):  # type: ignore[misc]
    """Two networks and MMSelfSup's own update of the one by the other."""

    networks = ("target_net", "online_net")

    def __init__(self, base_momentum: float = 0.9) -> None:
        super().__init__()
        target, online = self.networks
        setattr(self, online, runs.Net())
        setattr(self, target, runs.Net().requires_grad_(False))
        self.base_momentum = base_momentum
        self.momentum = base_momentum

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        target, online = (
            torch.stack(getattr(self, name)(view, labels, mode="predict"))
            for name, view in zip(self.networks, (images.flip(-1), images), strict=True)
        )
        if mode == "loss":
            supervised = nn.functional.cross_entropy(online, labels)
            return {"loss": supervised + nn.functional.mse_loss(online, target)}
        return [*target, *online]


class Byol(Algorithm):
    """Updated by the method of MMSelfSup's BYOL itself: ours knows it, and doesn't call it."""

    momentum_update = BYOL.momentum_update


class OwnUpdate(Algorithm):
    """With an update that ours doesn't know, of the same arithmetic."""

    @torch.no_grad()
    def momentum_update(self) -> None:
        BYOL.momentum_update(self)


class Spied(Byol):
    """Counts the calls of its update."""

    calls = 0

    def momentum_update(self) -> None:
        type(self).calls += 1
        super().momentum_update()


def both(
    folder: Path,
    model: type[Algorithm] = Byol,
    networks: tuple[str, str] | None = None,
    name: str = "FusedMomentumUpdateHook",
    hook: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[runs.Run, runs.Run]:
    """The original's run and ours; ``hook`` is what both are given."""
    theirs = {"type": Theirs, **(hook or {})}
    ours = {"type": name, **(hook or {}), **({"networks": networks} if networks else {})}
    their, our = runs.side_by_side(theirs, ours, folder, model=model, **arguments)
    assert type(our.hook(MomentumUpdateHook)) is MomentumUpdateHook
    return their, our


def unequal(their: runs.Run, our: runs.Run) -> list[str]:
    assert our.model.momentum == their.model.momentum
    return runs.differences(their.everything(), our.everything())


def test_a_training_is_equal_to_the_bit(tmp_path: Path) -> None:
    their, our = both(tmp_path, epochs=24, val_interval=6, save_interval=8)
    assert our.runner.iter == 120
    assert len(our.metrics) == 4
    assert unequal(their, our) == []
    # Set before the last iteration, the 120th: almost, but not yet, at its end.
    assert our.model.momentum == 1 - 0.1 * (math.cos(math.pi * 119 / 120) + 1) / 2
    target, online = our.model.target_net.head.weight, our.model.online_net.head.weight
    assert 0.001 < (target - online).abs().max() < 1


@pytest.mark.parametrize("loop", ["epochs", "iterations"])
@pytest.mark.parametrize("name", ["FusedMomentumUpdateHook", "FusedBYOLHook"])
@pytest.mark.parametrize(
    "hook", [{}, {"end_momentum": 0.95}, {"update_interval": 3}], ids=["plain", "end", "interval"]
)
def test_arguments_and_loops_are_equal_to_the_bit(
    hook: dict[str, Any], name: str, loop: str, tmp_path: Path
) -> None:
    length = {"epochs": 4} if loop == "epochs" else {"iters": 20, "val_interval": 5}
    assert unequal(*both(tmp_path, name=name, hook=hook, **length)) == []


def test_the_original_s_update_is_not_called_where_its_networks_are_known(tmp_path: Path) -> None:
    """By what it is in MMSelfSup, or because they are named."""

    def never(self: Any) -> None:
        raise AssertionError("the algorithm's own update was called")

    never.__module__, never.__qualname__ = BYOL.__module__, "BYOL.momentum_update"
    known = type("Known", (Algorithm,), {"momentum_update": never})
    hook = {"type": "FusedMomentumUpdateHook"}
    found = [runs.trained(hook, tmp_path / "known", model=known)]
    Spied.calls = 0
    hook["networks"] = ("target_net", "online_net")
    found.append(runs.trained(hook, tmp_path / "named", model=Spied))
    assert Spied.calls == 0
    expected = runs.trained({"type": Theirs}, tmp_path / "original", model=Byol)
    for run in found:
        assert unequal(expected, run) == []


@pytest.mark.parametrize("known", ALGORITHMS, ids=lambda known: known.__name__)
def test_each_algorithm_of_mmselfsup_is_updated_as_by_its_own_method(
    known: Any, tmp_path: Path
) -> None:
    networks = ALGORITHMS[known]
    update = {"networks": networks, "momentum_update": known.momentum_update}
    model = type("Known", (Algorithm,), update)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        their, our = both(tmp_path, model=model)
    assert unequal(their, our) == []


def test_an_algorithm_that_is_not_known_updates_itself_unless_its_networks_are_named(
    tmp_path: Path,
) -> None:
    their, our = both(tmp_path / "unknown", model=OwnUpdate)
    slow = [message for message in our.messages if "by its own momentum_update()" in message]
    assert len(slow) == 1 and slow[0].startswith("OwnUpdate is updated")
    assert unequal(their, our) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        named = both(tmp_path / "named", model=OwnUpdate, networks=OwnUpdate.networks)
    assert unequal(*named) == []
    assert runs.differences(named[1].everything(), our.everything()) == []


@pytest.mark.parametrize("resumed_by", ["ours", "theirs"])
def test_checkpoints_go_both_ways(resumed_by: str, tmp_path: Path) -> None:
    whole = dict(zip(("theirs", "ours"), both(tmp_path, epochs=4), strict=True))
    hook = {"ours": {"type": "FusedMomentumUpdateHook"}, "theirs": {"type": Theirs}}[resumed_by]
    saved_by = "theirs" if resumed_by == "ours" else "ours"
    file = whole[saved_by].folder / "epoch_2.pth"
    rest = {"epochs": 4, "load_from": file, "resume": True}
    run = runs.trained(hook, tmp_path / "rest", model=Byol, **rest)
    assert runs.differences(snapshot(run.model), snapshot(whole[saved_by].model)) == []
    assert run.model.momentum == whole[saved_by].model.momentum


# The hook by itself.


class TwoNetworks(nn.Module):
    """What the hook asks of an algorithm."""

    base_momentum: float
    momentum: float
    momentum_update = BYOL.momentum_update

    def __init__(self) -> None:
        super().__init__()
        self.online_net, self.target_net = conv_net(), conv_net(seed=1)
        self.base_momentum = self.momentum = 0.9


def iterate(hook: Any, model: nn.Module, start: int, end: int, wrapper: Any = None) -> None:
    """Trains the online network, with the hook before and after each iteration."""
    random = generator(start)
    for iteration in range(start, end):
        wrapped = model if wrapper is None else wrapper(model)
        runner = SimpleNamespace(model=wrapped, iter=iteration, max_iters=20)
        hook.before_train_iter(runner, 0)
        train(model.online_net, random)
        hook.after_train_iter(runner, 0)


def side_by_side(change: Any, wrapper: Any = None) -> list[str]:
    """Names of what differs after six iterations with ``change`` in the middle."""
    models = [TwoNetworks(), TwoNetworks()]
    for hook, model in zip((Theirs(), MomentumUpdateHook()), models, strict=True):
        iterate(hook, model, 0, 3, wrapper)
        torch.manual_seed(0)
        change(model)
        iterate(hook, model, 3, 6, wrapper)
    assert models[0].momentum == models[1].momentum
    assert differences(snapshot(models[1]), snapshot(TwoNetworks())) != []
    return differences(*map(snapshot, models))


@pytest.mark.parametrize("wrapper", [None, nn.DataParallel], ids=["bare", "wrapped"])
def test_the_model_is_seen_through_a_wrapper(wrapper: Any) -> None:
    assert side_by_side(lambda model: None, wrapper) == []


@pytest.mark.parametrize(
    "change",
    [
        # The original's own update replaces the memory of every parameter.
        lambda model: model.momentum_update(),
        lambda model: setattr(model.online_net.head, "bias", nn.Parameter(torch.ones(31))),
        lambda model: setattr(model.target_net.head, "bias", nn.Parameter(torch.ones(31))),
        lambda model: setattr(model, "target_net", conv_net(seed=7)),
        lambda model: model.double(),
        lambda model: setattr(model, "base_momentum", 0.5),
    ],
    ids=["memory", "online parameter", "target parameter", "network", "dtype", "base_momentum"],
)
def test_what_is_replaced_is_followed(change: Any) -> None:
    assert side_by_side(change) == []


def test_momentum_and_networks_change_at_the_interval_alone() -> None:
    for hook in (Theirs(update_interval=4), MomentumUpdateHook(update_interval=4)):
        model = TwoNetworks()
        momenta, targets = [], []
        for iteration in range(8):
            iterate(hook, model, iteration, iteration + 1)
            momenta.append(model.momentum)
            targets.append(snapshot(model.target_net)["head.bias"])
        assert momenta[:4] == [0.9, 0.9, 0.9, 1 - 0.1 * (math.cos(math.pi * 3 / 20) + 1) / 2]
        moved = [not torch.equal(one, other) for one, other in itertools.pairwise(targets)]
        assert moved == [False, False, True, False, False, False, True]


def test_both_names_are_in_mmengine_s_registry() -> None:
    assert BYOLHook is MomentumUpdateHook
    for name in ("FusedMomentumUpdateHook", "FusedBYOLHook"):
        assert HOOKS.get(name) is MomentumUpdateHook


# Errors, and what is ignored.


@pytest.mark.parametrize("lacking", ["base_momentum", "momentum"])
def test_an_algorithm_without_a_momentum_is_an_error_that_says_what_is_needed(lacking: str) -> None:
    model = TwoNetworks()
    delattr(model, lacking)
    with pytest.raises(AttributeError, match=rf"TwoNetworks has no attribute '{lacking}', which"):
        iterate(MomentumUpdateHook(), model, 0, 1)


def test_networks_that_the_model_lacks_are_an_error_that_names_them() -> None:
    hook = MomentumUpdateHook(networks=("target", "online_net"))
    with pytest.raises(AttributeError, match="TwoNetworks has no attribute 'target', which"):
        iterate(hook, TwoNetworks(), 0, 1)


def test_networks_that_differ_are_refused_where_the_original_changes_a_part() -> None:
    model = TwoNetworks()
    model.target_net.head = nn.Linear(67, 30)
    before = snapshot(model.target_net)
    with pytest.raises(ValueError, match=r"'head\.weight' has shape \(30, 67\)"):
        iterate(MomentumUpdateHook(), model, 0, 1)
    assert differences(snapshot(model.target_net), before) == []
    with pytest.raises(RuntimeError, match="must match the size"):
        iterate(Theirs(), model, 0, 1)
    assert "conv.weight" in differences(snapshot(model.target_net), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"end_momentum": 1.5}, ValueError, r"end_momentum is 1\.5; a number in \[0, 1\]"),
        ({"update_interval": 2.5}, TypeError, r"update_interval is 2\.5; an integer"),
        ({"networks": ("one",)}, ValueError, r"networks is \('one',\); two names"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MomentumUpdateHook(**arguments)


def test_unknown_arguments_are_ignored_as_by_the_original_but_not_in_silence() -> None:
    Original(another=1)
    with pytest.warns(UserWarning, match="MomentumUpdateHook ignores another"):
        assert MomentumUpdateHook(another=1).update_interval == 1
