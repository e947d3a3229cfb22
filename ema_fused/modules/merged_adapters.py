"""Adapters that were merged into the weights below them, as PEFT does: then they do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def merged_in(model: nn.Module) -> Sequence[str]:
    """The names of the merged adapters, as the first layer that can merge keeps them: its own list.

    PEFT merges and unmerges all layers in one call and changes their lists, so that this one tells
    of later calls too. Empty if there is no such layer.
    """
    for module in model.modules():
        merged = vars(module).get("merged_adapters")
        if isinstance(merged, list):
            return merged
    return ()


def refuse_merged(model: nn.Module) -> None:
    """Raises RuntimeError if adapters of ``model`` are merged."""
    merged = merged_in(model)
    if merged:
        raise RuntimeError(
            f"the model's adapters are merged into its weights ({', '.join(map(str, merged))}): "
            f"they neither train nor act so, and neither do their averages. Call "
            f"model.unmerge_adapter() before you go on; to merge averages, do it in a copy of the "
            f"model, after averaged.copy_to(copy)"
        )
