"""Says what was passed where a model is expected, and what to pass."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_model(call: str, model: Any) -> None:
    """Raises TypeError if ``model`` isn't a module.

    Args:
        call: the call that it was passed to; the message begins with it.
    """
    if isinstance(model, nn.Module):
        return
    instead = "pass the model itself"
    if isinstance(model, dict):
        instead += ", not its state_dict()"
    elif hasattr(model, "__iter__"):
        instead += ", not its parameters()"
    elif hasattr(model, "param_groups"):
        instead += ", not its optimizer"
    raise TypeError(
        f"{call} was given a {type(model).__name__}; a torch.nn.Module is expected: {instead}"
    )
