"""Gives an existing EMA wrapper our update."""

from __future__ import annotations

import importlib
from typing import TypeVar

Wrapper = TypeVar("Wrapper")

# The originals by module and name, and our module with the class of the same name. Names, not
# classes: a package is imported only if an instance of its class is passed.
_REPLACED = {
    "torch.optim.swa_utils.AveragedModel": "swa_utils",
    "timm.utils.model_ema.ModelEmaV2": "timm",
    "timm.utils.model_ema.ModelEmaV3": "timm",
    "diffusers.training_utils.EMAModel": "diffusers",
    "ema_pytorch.ema_pytorch.EMA": "ema_pytorch",
    "torch_ema.ema.ExponentialMovingAverage": "torch_ema",
    "ultralytics.utils.torch_utils.ModelEMA": "ultralytics",
}


def accelerate(wrapper: Wrapper) -> str:
    """Replaces the update of ``wrapper`` by ours, in place: it stays the same object.

    Its class becomes ours, which derives from the original class; all attributes stay. So it may be
    done in the middle of training.

    Args:
        wrapper: an instance of one of the classes that :mod:`ema_fused.adapters` lists.

    Returns:
        A sentence for a log that says what was done.

    Raises:
        TypeError: it is of another class (even a derived one, which may update in another way); the
            message lists the supported classes.
    """
    cls = type(wrapper)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if any(base.__module__.startswith("ema_fused.adapters.") for base in cls.__mro__):
        return f"{cls.__qualname__} is updated by ema_fused already"
    if name not in _REPLACED:
        raise TypeError(
            f"a {name} can't be accelerated; supported are {', '.join(_REPLACED)} (themselves, not "
            f"classes derived from them: those derive from the one in ema_fused.adapters instead)"
        )
    module = importlib.import_module(f"ema_fused.adapters.{_REPLACED[name]}")
    wrapper.__class__ = getattr(module, cls.__qualname__)
    return f"{name}: its update is now ema_fused.adapters.{_REPLACED[name]}.{cls.__qualname__}'s"
