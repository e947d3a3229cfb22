"""EMA wrappers by themselves, and with our update in their place."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import swa_utils

from benchmarks.peers.side import Match, Side, match, network, tests_importable

_DECAY = 0.999


def _load(name: str) -> Any:
    return importlib.import_module(name)


def _side(update: Callable[[], object], model: Any, averages: Callable[[], Any]) -> Side:
    return Side(
        (update,),
        list(model.parameters()),
        lambda: {f"average {place}": tensor for place, tensor in enumerate(averages())},
    )


# ---- torch ---------------------------------------------------------------------------------------


def _torch_matches() -> list[Match]:
    ours = _load("ema_fused.adapters.swa_utils")
    return [
        match("torch AveragedModel, EMA", _averaged_model_ema, ours, swa_utils),
        match("torch AveragedModel, mean", _averaged_model, ours, swa_utils, exact=False),
        match("torch get_ema_multi_avg_fn on lists", _on_lists, ours, swa_utils),
    ]


def _averaged_model(module: Any, values: list[Tensor], **arguments: Any) -> Side:
    model = network(values)
    averaged = module.AveragedModel(model, **arguments)
    averaged.update_parameters(model)  # the first call copies
    return _side(partial(averaged.update_parameters, model), model, averaged.module.parameters)


def _averaged_model_ema(module: Any, values: list[Tensor]) -> Side:
    return _averaged_model(module, values, multi_avg_fn=module.get_ema_multi_avg_fn(_DECAY))


def _on_lists(module: Any, values: list[Tensor]) -> Side:
    """With fresh lists each time, as torch's ``AveragedModel`` makes them."""
    model = network(values)
    averages = [tensor.clone() for tensor in values]
    function = module.get_ema_multi_avg_fn(_DECAY)

    def update() -> None:
        function(
            [tensor.detach() for tensor in averages], [p.detach() for p in model.parameters()], 1
        )

    return _side(update, model, lambda: averages)


# ---- timm ----------------------------------------------------------------------------------------


def _timm_matches() -> list[Match]:
    if importlib.util.find_spec("timm") is not None:
        original = _load("timm.utils")
    else:
        tests_importable()
        original = _load(
            "tests.frameworks.adapters.adapter_cases"
        ).timm_originals()  # from where `make` unpacked it
    ours = _load("ema_fused.adapters.timm")
    return [
        match(f"timm {name}", partial(_timm, name), ours, original)
        for name in ("ModelEmaV3", "ModelEmaV2")
    ]


def _timm(name: str, module: Any, values: list[Tensor]) -> Side:
    model = network(values)
    wrapper = getattr(module, name)(model, decay=_DECAY)
    return _side(partial(wrapper.update, model), model, wrapper.module.parameters)


# ---- diffusers, ema-pytorch, torch-ema -----------------------------------------------------------


def _diffusers_matches() -> list[Match]:
    original = _load("diffusers.training_utils")
    ours = _load("ema_fused.adapters.diffusers")
    return [
        match("diffusers EMAModel", partial(_diffusers, False), ours, original, exact=False),
        match("diffusers EMAModel, foreach", partial(_diffusers, True), ours, original),
    ]


def _diffusers(foreach: bool, module: Any, values: list[Tensor]) -> Side:
    model = network(values)
    wrapper = module.EMAModel(model.parameters(), decay=_DECAY, min_decay=_DECAY, foreach=foreach)
    wrapper.step(model.parameters())  # the first call copies
    return _side(lambda: wrapper.step(model.parameters()), model, lambda: wrapper.shadow_params)


def _ema_pytorch_matches() -> list[Match]:
    ours = _load("ema_fused.adapters.ema_pytorch")
    return [match("ema-pytorch EMA", _ema_pytorch, ours, _load("ema_pytorch"))]


def _ema_pytorch(module: Any, values: list[Tensor]) -> Side:
    model = network(values)
    wrapper = module.EMA(model, beta=_DECAY, min_value=_DECAY, update_after_step=0, update_every=1)
    for _ in range(2):  # the first calls copy
        wrapper.update()
    return _side(wrapper.update, model, wrapper.ema_model.parameters)


def _torch_ema_matches() -> list[Match]:
    ours = _load("ema_fused.adapters.torch_ema")
    title = "torch-ema ExponentialMovingAverage"
    return [match(title, _torch_ema, ours, _load("torch_ema"), exact=False)]


def _torch_ema(module: Any, values: list[Tensor]) -> Side:
    model = network(values)
    wrapper = module.ExponentialMovingAverage(
        model.parameters(), decay=_DECAY, use_num_updates=False
    )
    return _side(wrapper.update, model, lambda: wrapper.shadow_params)


MATCHES = {
    "swa_utils": _torch_matches,
    "timm": _timm_matches,
    "diffusers": _diffusers_matches,
    "ema_pytorch": _ema_pytorch_matches,
    "torch_ema": _torch_ema_matches,
}
