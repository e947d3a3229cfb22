"""What our callbacks take from Lightning: its callbacks, and which strategies shard a model."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ema_fused.frameworks import missing

__all__ = ["is_deepspeed", "originals", "shards"]


def originals() -> Any:
    """Lightning's module with the original callbacks.

    Raises:
        ImportError: no installed package has it.
    """
    packages = ["lightning.pytorch", "pytorch_lightning"]
    why = None
    # The package in use first: importing the other one as well would take seconds.
    for package in sorted(packages, key=lambda name: name not in sys.modules):
        try:
            module = importlib.import_module(f"{package}.callbacks.weight_averaging")
            if not hasattr(module, "EMAWeightAveraging"):
                raise ImportError(f"this {package} has no EMAWeightAveraging, which came with 2.6")
            return module
        except ImportError as error:
            why = why or error
    assert why is not None
    raise missing("lightning", "lightning", why) from why


def shards(strategy: object) -> bool:
    """Whether ``strategy`` spreads the model over the processes, or may do so."""
    return _is_one_of(strategy, ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"))


def is_deepspeed(strategy: object) -> bool:
    return _is_one_of(strategy, ("DeepSpeedStrategy",))


def _is_one_of(strategy: object, names: tuple[str, ...]) -> bool:
    """By the names of its classes: the strategies of both packages count."""
    return any(
        cls.__name__ in names and cls.__module__.partition(".")[2].startswith(("pytorch.", "strat"))
        for cls in type(strategy).__mro__
    )
