"""The hooks and averages of OpenMMLab's systems, and ours in their place.

Hooks are called as a runner calls them, with a runner that has only what they look at. mmdet,
MMPretrain and MMSelfSup are loaded from where `make` unpacked them. Both sides are given the
original's average: our hook puts ours in its place.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from benchmarks.peers.side import Match, Side, match, network, tests_importable

_MAX_ITERS = 1_000_000  # more than are run, so that no schedule comes to its end
_SWAP_BYTES = 2 * 4 * 4  # in and out again: two float32 tensors read and written, twice


def _load(name: str) -> Any:
    return importlib.import_module(name)


def _original(pin: str, module: str) -> Any:
    tests_importable()
    return _load("tests.frameworks.originals").original(pin, module)


def _import_mmcv() -> None:
    tests_importable()
    _load("tests.frameworks.originals").import_mmcv()
    warnings.filterwarnings("ignore", "On January 1, 2023, MMCV will release", UserWarning)
    warnings.filterwarnings("ignore", "This overload of add_ is deprecated", UserWarning)


def _runner(model: nn.Module) -> Any:
    return SimpleNamespace(model=model, iter=0, epoch=0, max_iters=_MAX_ITERS, max_epochs=1)


def _side(
    runner: Any, trained: nn.Module, state: Callable[[], dict[str, Tensor]], *calls: Any
) -> Side:
    def next_step() -> None:
        runner.iter += 1

    return Side(calls, list(trained.parameters()), state, next_step)


# ---- mmengine ------------------------------------------------------------------------------------


def _mmengine_matches() -> list[Match]:
    averages = _load("mmengine.model")
    _tell_max_iters()
    names = ("ExponentialMovingAverage", "StochasticWeightAverage", "MomentumAnnealingEMA")
    found = [_hook_match(f"EMAHook, {name}", _averaging, getattr(averages, name)) for name in names]
    swapping = averages.ExponentialMovingAverage
    title = "EMAHook, swap in and out"
    return [*found, _hook_match(title, _swapping, swapping, bytes_moved=_SWAP_BYTES)]


def _mmpretrain_matches() -> list[Match]:
    _tell_max_iters()
    average = _original("mmpretrain==1.2.0", "mmpretrain.models.utils.ema").CosineEMA
    return [_hook_match("EMAHook, CosineEMA", _averaging, average)]


def _hook_match(title: str, side: Callable[..., Side], average: type, **rest: Any) -> Match:
    ours, original = _load("ema_fused.hooks.mmengine"), _load("mmengine.hooks")
    return match(title, partial(side, average), ours, original, **rest)


def _tell_max_iters() -> None:
    """What a runner tells about itself to averages, which see no runner."""
    hub = _load("mmengine.logging").MessageHub.get_current_instance()
    hub.update_info("max_iters", _MAX_ITERS)


def _averaging(average: type, hooks: Any, values: list[Tensor]) -> Side:
    model, hook, runner = _mmengine_hook(average, hooks, values)
    return _side(
        runner,
        model,
        lambda: {**hook.ema_model.state_dict(), **model.state_dict()},
        lambda: hook.after_train_iter(runner, 0),
    )


def _swapping(average: type, hooks: Any, values: list[Tensor]) -> Side:
    model, hook, runner = _mmengine_hook(average, hooks, values)
    return _side(
        runner,
        model,
        lambda: {**hook.ema_model.state_dict(), **model.state_dict()},
        lambda: hook.before_val_epoch(runner),
        lambda: hook.after_val_epoch(runner),
    )


def _mmengine_hook(average: type, hooks: Any, values: list[Tensor]) -> tuple[nn.Module, Any, Any]:
    """The hook and its runner, where averaging has begun."""
    model = network(values)
    runner = _runner(model)
    hook = hooks.EMAHook(ema_type=average)
    hook.before_run(runner)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)  # the first call copies; from here on it averages
    return model, hook, runner


# ---- mmdet ---------------------------------------------------------------------------------------


def _mmdet_matches() -> list[Match]:
    _tell_max_iters()
    average = _original("mmdet==3.3.0", "mmdet.models.layers.ema").ExpMomentumEMA
    teaching = _original("mmdet==3.3.0", "mmdet.engine.hooks.mean_teacher_hook")
    return [
        _hook_match("3.x EMAHook, ExpMomentumEMA", _averaging, average),
        match("3.x MeanTeacherHook", _teaching, _load("ema_fused.hooks.mmdet"), teaching),
    ]


def _mmdet_2_matches() -> list[Match]:
    _import_mmcv()
    original = _original("mmdet==2.28.2", "mmdet.core.hook.ema")
    ours = _load("ema_fused.hooks.mmcv")
    return [
        match(f"2.x {name}", partial(_registered, name), ours, original)
        for name in ("ExpMomentumEMAHook", "LinearMomentumEMAHook")
    ]


def _teaching(hooks: Any, values: list[Tensor]) -> Side:
    model = nn.Module()
    model.teacher, model.student = network(values), network(values)
    runner = _runner(model)
    hook = hooks.MeanTeacherHook()
    hook.before_train(runner)
    update = partial(hook.after_train_iter, runner, 0)
    return _side(runner, model.student, model.state_dict, update)


# ---- mmcv and MMSelfSup --------------------------------------------------------------------------


def _mmcv_matches() -> list[Match]:
    _import_mmcv()
    ours, original = _load("ema_fused.hooks.mmcv"), _load("mmcv.runner.hooks.ema")
    return [match("1.x EMAHook", partial(_registered, "EMAHook"), ours, original)]


def _registered(name: str, hooks: Any, values: list[Tensor]) -> Side:
    """The hooks on mmcv's runners keep their averages in the model."""
    model = network(values)
    runner = _runner(model)
    hook = getattr(hooks, name)()
    hook.before_run(runner)
    return _side(runner, model, model.state_dict, partial(hook.after_train_iter, runner))


def _mmselfsup_matches() -> list[Match]:
    _import_mmcv()
    pin = "mmselfsup==0.11.0"
    ours = _load("ema_fused.hooks.mmselfsup")
    original = _original(pin, "mmselfsup.core.hooks.momentum_update_hook")
    byol = _original(pin, "mmselfsup.models.algorithms.byol").BYOL
    parts = _original(pin, "mmselfsup.models.builder").MODELS
    parts.register_module(name="BenchmarkBackbone", force=True, module=_Backbone)
    parts.register_module(name="BenchmarkIdentity", force=True, module=nn.Identity)
    return [match("0.x MomentumUpdateHook, BYOL", partial(_self_supervised, byol), ours, original)]


def _self_supervised(byol: Callable[..., Any], hooks: Any, values: list[Tensor]) -> Side:
    """MMSelfSup's own BYOL; its target network gets new storage at each of its own updates."""
    model = byol(
        backbone={"type": "BenchmarkBackbone", "values": values},
        neck={"type": "BenchmarkIdentity"},
        head={"type": "BenchmarkIdentity"},
    )
    wrapped = _load("mmcv.parallel").MMDataParallel(model, device_ids=[])  # as the original wants
    runner = _runner(wrapped)
    hook = hooks.MomentumUpdateHook()
    return _side(
        runner,
        model.online_net,
        model.state_dict,
        partial(hook.before_train_iter, runner),
        partial(hook.after_train_iter, runner),
    )


class _Backbone(nn.Module):
    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.network = network(values)


MATCHES = {
    "mmengine": _mmengine_matches,
    "mmdet": _mmdet_matches,
    "mmdet_2": _mmdet_2_matches,
    "mmpretrain": _mmpretrain_matches,
    "mmcv": _mmcv_matches,
    "mmselfsup": _mmselfsup_matches,
}
