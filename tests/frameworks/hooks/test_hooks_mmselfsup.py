"""Our ``MomentumUpdateHook`` beside MMSelfSup 0.11's, with its own BYOL and MoCo v3.

In mmcv's runner; what is different on purpose comes last.
"""

from __future__ import annotations

import itertools
import math
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ema_fused import SlowPathWarning
from ema_fused.hooks import mmselfsup as ours
from ema_fused.hooks import momentum_update as shared
from tests import processes
from tests.frameworks.hooks.mmcv_runs import (
    BATCHES,
    Run,
    assert_same,
    mmcv_parallel,
    mmcv_runner,
    run,
)
from tests.frameworks.originals import original
from tests.networks import differences, snapshot

PIN = "mmselfsup==0.11.0"
theirs = original(PIN, "mmselfsup.core.hooks.momentum_update_hook")
models = original(PIN, "mmselfsup.models.builder")
BYOL = original(PIN, "mmselfsup.models.algorithms.byol").BYOL
MoCoV3 = original(PIN, "mmselfsup.models.algorithms.mocov3").MoCoV3
for _module in ("heads.latent_pred_head", "necks.nonlinear_neck"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        original(PIN, f"mmselfsup.models.{_module}")

EPOCHS = 3
MMDataParallel = mmcv_parallel.MMDataParallel


@models.BACKBONES.register_module()
class TinyBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.norm(self.conv(images)).relu()]


def built(algorithm: Any, seed: int = 0, **arguments: Any) -> Any:
    """A small model of an algorithm."""
    torch.manual_seed(seed)
    neck = {"type": "NonLinearNeck", "hid_channels": 10, "out_channels": 7}
    neck["norm_cfg"] = {"type": "BN1d"}
    model = algorithm(
        backbone={"type": "TinyBackbone"},
        neck={**neck, "in_channels": 6},
        head={
            "type": "LatentPredictHead",
            "predictor": {**neck, "in_channels": 7, "with_avg_pool": False},
        },
        **arguments,
    )
    if algorithm is MoCoV3:  # which does it in init_weights(), and initialises far more there
        model.momentum_encoder.requires_grad_(False)
    return model


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MoCo v3 sends its images to the GPU."""
    monkeypatch.setattr(Tensor, "cuda", lambda tensor, **_: tensor)


def views() -> Any:
    random = torch.Generator().manual_seed(5)
    pairs = torch.randn(4 * BATCHES, 2, 1, 6, 6, generator=random)
    return DataLoader([{"img": list(pair)} for pair in pairs], batch_size=4)  # type: ignore[arg-type]


class Momenta(mmcv_runner.Hook):  # type: ignore[misc, name-defined]
    """Takes down the momentum that each iteration sets."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def before_train_iter(self, runner: Any) -> None:
        self.seen.append(getattr(runner.model, "module", runner.model).momentum)


def train(
    hook: Any, model: nn.Module, wrap: Any = None, **training: Any
) -> tuple[Run, list[float]]:
    momenta = Momenta()
    training = {"epochs": EPOCHS, "evaluate": False, "batches": views(), **training}
    return run(hook, momenta, model=model, wrap=wrap, **training), momenta.seen


# The same to the bit.


@pytest.mark.parametrize("wrap", [MMDataParallel, None], ids=["wrapped", "bare"])
@pytest.mark.parametrize("end_momentum", [1.0, 0.99])
@pytest.mark.parametrize("update_interval", [1, 3])
@pytest.mark.parametrize("kind", ["epoch", "iter"])
@pytest.mark.parametrize("algorithm", [BYOL, MoCoV3])
def test_every_iteration_is_equal_to_the_bit(
    algorithm: Any, kind: str, update_interval: int, end_momentum: float, wrap: Any
) -> None:
    """The original needs the wrapper, ours does without."""
    arguments = {"end_momentum": end_momentum, "update_interval": update_interval}
    model, their_model = (built(algorithm, base_momentum=0.996) for _ in range(2))
    their_run, their_momenta = train(
        theirs.MomentumUpdateHook(**arguments), their_model, MMDataParallel, kind=kind
    )
    our_run, our_momenta = train(ours.MomentumUpdateHook(**arguments), model, wrap, kind=kind)
    assert our_momenta == their_momenta
    assert_same(our_run, their_run)
    # And it was a training in which there was something to see.
    assert our_momenta[0] == 0.996
    updates = EPOCHS * BATCHES // update_interval
    assert len(set(our_momenta)) == updates + (update_interval > 1)  # until the first, its base
    assert_target_moves(our_run, update_interval)


def assert_target_moves(done: Run, update_interval: int) -> None:
    """After the iterations of an update, and no others."""
    name = "target_net" if isinstance(done.model, BYOL) else "momentum_encoder"
    values = [tensors[f"{name}.0.conv.weight"] for tensors in done.of("trained")]
    for iteration, (before, after) in enumerate(itertools.pairwise(values), 1):
        assert torch.equal(before, after) == ((iteration + 1) % update_interval != 0)


def test_by_the_originals_name_and_by_default() -> None:
    assert ours.BYOLHook is ours.MomentumUpdateHook
    found, expected = ours.BYOLHook(), theirs.MomentumUpdateHook()
    for name, value in vars(expected).items():
        assert getattr(found, name) == value
    assert vars(ours.BYOLHook(0.9, 3)).items() >= vars(theirs.MomentumUpdateHook(0.9, 3)).items()


def test_a_subclass_of_an_algorithm_is_fused_as_well(recwarn: pytest.WarningsRecorder) -> None:
    class Mine(BYOL):  # type: ignore[misc, valid-type]
        pass

    (one, _), (other, _) = (train(ours.BYOLHook(), built(cls)) for cls in (Mine, BYOL))
    assert_same(one, other)
    assert not [warning for warning in recwarn if warning.category is SlowPathWarning]


@pytest.mark.parametrize("algorithm", [BYOL, MoCoV3])
def test_known_algorithms_are_updated_in_place_where_theirs_get_new_storage(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = shared.momentum_update

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        real(*arguments)

    monkeypatch.setattr(shared, "momentum_update", counted)
    for hook, in_place in ((theirs.MomentumUpdateHook(), False), (ours.BYOLHook(), True)):
        model = built(algorithm)
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        train(hook, model, MMDataParallel)
        after = [parameter.data_ptr() for parameter in model.parameters()]
        assert (after == addresses) == in_place
        assert len(calls) == (EPOCHS * BATCHES if in_place else 0)


def test_cae_is_fused_as_well_where_it_has_a_base_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hasn't by itself: its forward pass updates its teacher. Then both hooks refuse it."""
    cae = original(PIN, "mmselfsup.models.algorithms.cae").CAE
    model, their_model = (built(cae, base_momentum=0.996) for _ in range(2))
    at = types.SimpleNamespace(model=MMDataParallel(model), iter=0, max_iters=10)
    with pytest.raises(AssertionError, match="base_momentum"):
        theirs.MomentumUpdateHook().before_train_iter(at)
    with pytest.raises(AttributeError, match="CAE has no attribute 'base_momentum'"):
        ours.MomentumUpdateHook().before_train_iter(at)
    model.base_momentum = 0.996
    hook = ours.MomentumUpdateHook()
    with monkeypatch.context() as patch:
        # The method stays the one that is known, and may not be called.
        patch.setattr(cae.momentum_update, "__code__", _refuse.__code__)
        hook.before_train_iter(at)
        hook.after_train_iter(at)
    their_model.momentum_update()
    assert differences(snapshot(model), snapshot(their_model)) == []
    assert "teacher.conv.weight" in differences(snapshot(model), snapshot(built(cae)))


def _refuse(self: Any) -> None:
    raise AssertionError("its own method was called")


# Algorithms of other kinds.


class Siamese(BYOL):  # type: ignore[misc, valid-type]
    """With an update of its own."""

    calls = 0

    @torch.no_grad()
    def momentum_update(self) -> None:
        self.calls += 1
        super().momentum_update()


def siamese(**arguments: Any) -> Any:
    torch.manual_seed(0)
    model = built(BYOL, **arguments)
    model.__class__ = Siamese
    return model


def test_an_unknown_algorithm_is_updated_by_its_own_method_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = siamese()
    with caplog.at_level("WARNING", "mmcv_runs"):  # the runner's logger
        our_run, _ = train(ours.MomentumUpdateHook(update_interval=2), model)
    slow = [record.getMessage() for record in caplog.records if record.name == "mmcv_runs"]
    assert len(slow) == 1
    assert "Siamese is updated by its own momentum_update()" in slow[0]
    assert "networks=('target_net', 'online_net')" in slow[0]
    assert model.calls == EPOCHS * BATCHES // 2
    their_hook = theirs.MomentumUpdateHook(update_interval=2)
    assert_same(our_run, train(their_hook, siamese(), MMDataParallel)[0])


@pytest.mark.parametrize("networks", [("target_net", "online_net"), ["target_net", "online_net"]])
def test_an_unknown_algorithm_is_fused_when_its_networks_are_named(networks: Any) -> None:
    model = siamese()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        our_run, _ = train(ours.MomentumUpdateHook(networks=networks), model)
    assert model.calls == 0
    assert_same(our_run, train(theirs.MomentumUpdateHook(), siamese(), MMDataParallel)[0])


# Registering.


@pytest.mark.parametrize("name", ["MomentumUpdateHook", "BYOLHook"])
def test_ours_and_the_originals_are_registered_side_by_side(name: str) -> None:
    added: list[Any] = []
    collector = type("Runner", (), {"register_hook": lambda _, hook, priority: added.append(hook)})
    for registered in (name, f"Fused{name}"):
        mmcv_runner.EpochBasedRunner.register_hook_from_cfg(
            collector(), {"type": registered, "end_momentum": 0.999}
        )
    assert [type(hook) for hook in added] == [theirs.MomentumUpdateHook, ours.MomentumUpdateHook]
    (our_run, _), (their_run, _) = (
        train(hook, built(BYOL), MMDataParallel) for hook in reversed(added)
    )
    assert_same(our_run, their_run)


def test_ours_take_the_originals_names_when_told_to() -> None:
    code = f"""
import sys
from tests.frameworks.originals import import_mmcv, original
import_mmcv()
from mmcv.runner import HOOKS
from ema_fused.hooks import mmselfsup as ours
assert HOOKS.get("MomentumUpdateHook") is None  # only beside
original({PIN!r}, "mmselfsup.core.hooks.momentum_update_hook")
assert HOOKS.get("BYOLHook") is not ours.BYOLHook
ours.register(replace=True)
for name in ("MomentumUpdateHook", "BYOLHook"):
    assert HOOKS.get(name) is HOOKS.get(f"Fused{{name}}") is ours.MomentumUpdateHook
assert "mmengine" not in sys.modules
"""
    processes.run("-c", code)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"update_interval": 1.5}, TypeError, r"update_interval is 1\.5; an integer is expected"),
        ({"end_momentum": 1.1}, ValueError, r"end_momentum is 1\.1; a number in \[0, 1\]"),
        ({"end_momentum": math.nan}, ValueError, r"end_momentum is nan; a number in \[0, 1\]"),
        ({"networks": ("target_net",)}, ValueError, r"networks is \('target_net',\); two names"),
    ],
)
def test_arguments_out_of_range_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ours.MomentumUpdateHook(**arguments)


def test_unknown_arguments_are_ignored_with_a_warning_where_theirs_say_nothing(
    recwarn: pytest.WarningsRecorder,
) -> None:
    theirs.MomentumUpdateHook(update_intervall=3)
    assert len(recwarn) == 0
    with pytest.warns(UserWarning, match="MomentumUpdateHook ignores update_intervall"):
        ours.MomentumUpdateHook(update_intervall=3)


@pytest.mark.parametrize("side", [theirs, ours], ids=["theirs", "ours"])
@pytest.mark.parametrize("update_interval", [0, -1])
def test_an_interval_of_nothing_never_updates(side: Any, update_interval: int) -> None:
    model = built(BYOL)
    before = snapshot(model.target_net)
    hook = side.MomentumUpdateHook(update_interval=update_interval)
    train(hook, model, MMDataParallel, epochs=1)
    changed = differences(snapshot(model.target_net), before)
    assert all("running" in name or "num_batches" in name for name in changed)


def test_a_bare_model_is_updated_where_theirs_raises() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'module'"):
        train(theirs.MomentumUpdateHook(), built(BYOL))
    assert train(ours.MomentumUpdateHook(), built(BYOL))[1][-1] > 0.996


@pytest.mark.parametrize("missing", ["momentum", "base_momentum"])
def test_a_model_without_a_momentum_is_named(missing: str) -> None:
    model = built(BYOL)
    delattr(model, missing)
    with pytest.raises(AttributeError, match=f"BYOL has no attribute '{missing}', which Moment"):
        train(ours.MomentumUpdateHook(), model)


def test_a_model_without_an_update_or_networks_is_named() -> None:
    class Lonely(nn.Linear):
        base_momentum = momentum = 0.9

    for arguments, name in (({}, "momentum_update"), ({"networks": ("a", "b")}, "a")):
        hook = ours.MomentumUpdateHook(**arguments)
        with pytest.raises(AttributeError, match=f"Lonely has no attribute '{name}'"):
            hook.after_train_iter(type("Runner", (), {"model": Lonely(1, 1), "iter": 0}))
