"""Gives an EMA wrapper that is there already our update."""

from __future__ import annotations

import importlib
from typing import TypeVar

Wrapper = TypeVar("Wrapper")

# The originals by their modules and names, and where the class of the same name is that replaces
# each. Names alone: none of these packages is imported before an instance of its class is here.
_REPLACED = {
    "torch.optim.swa_utils.AveragedModel": "swa_utils",
    "timm.utils.model_ema.ModelEmaV2": "timm",
    "timm.utils.model_ema.ModelEmaV3": "timm",
    "diffusers.training_utils.EMAModel": "diffusers",
    "ema_pytorch.ema_pytorch.EMA": "ema_pytorch",
    "torch_ema.ema.ExponentialMovingAverage": "torch_ema",
}


def accelerate(wrapper: Wrapper) -> str:
    """Swaps the update of ``wrapper`` for ours, in place: it stays the object that it is.

    Its class becomes ours, which derives from the one that it had; all it holds stays, so it may be
    done in the middle of a training.

    Args:
        wrapper: an instance of one of the classes that :mod:`ema_fused.adapters` lists.

    Returns:
        What was done, in words, for a log.

    Raises:
        TypeError: it is of another class (a derived one may update in another way); the message
            lists what is supported.
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
