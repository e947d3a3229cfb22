"""Averages of weights that a parametrization computes, when it is put on or taken off."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.modules.naming import plain_path


def carry_computed(new: nn.Module, old: nn.Module, started: Collection[str]) -> list[str]:
    """Carries averages of ``old`` over to ``new`` where a parametrization came or went.

    One that was taken off (``remove_parametrizations``) leaves its weight, which is computed from
    the averages of its originals; for one that was put on, the average of the weight is taken apart
    by its ``right_inverse``. Only where both are whole modules: bare ones can't compute.

    Args:
        new: a fresh average of the changed model; written.
        old: the average so far; not changed.
        started: the names in ``new`` of parameters without an average, in memory of their own.

    Returns:
        Those of the names that have one now.
    """
    parts = {plain_path(path): part for path, part in old.named_modules()}
    carried: list[str] = []
    for path, part in new.named_modules():
        before, prefix = parts.get(plain_path(path)), f"{path}." if path else ""
        if before is None:
            continue
        now, then = _parametrizations(part), _parametrizations(before)
        if now.keys() == then.keys() or not _have_values(part, before):
            continue
        for key in then.keys() - now.keys():
            tensor = part._parameters.get(key)
            value = _computed(then[key])
            if prefix + key in started and tensor is not None and value.shape == tensor.shape:
                tensor.copy_(value)
                carried.append(prefix + key)
        for key in now.keys() - then.keys():
            names = [
                f"{prefix}parametrizations.{key}.{name}"
                for name, _ in now[key].named_parameters(recurse=False)
            ]
            average = before._parameters.get(key)
            if average is None or not names or not set(names) <= set(started):
                continue
            if _take_apart(now[key], average):
                carried += names
    return carried


def _have_values(*parts: nn.Module) -> bool:
    tensors = [tensor for part in parts for tensor in part.parameters()]
    return not any(is_lazy(tensor) or tensor.is_meta for tensor in tensors)


def _parametrizations(part: nn.Module) -> dict[str, nn.Module]:
    found = getattr(part, "parametrizations", None)
    return dict(found.items()) if isinstance(found, nn.ModuleDict) else {}


def _computed(parametrization: nn.Module) -> Tensor:
    """The tensor, as at evaluation. Not the attribute of the layer: copies of a layer share its
    class, and the attribute goes from the class where it goes from one of them.
    """
    # A copy: spectral_norm, say, writes buffers in training mode.
    value: Tensor = copy.deepcopy(parametrization).eval()()
    return value


def _take_apart(parametrization: nn.Module, average: Tensor) -> bool:
    """Sets the originals so that they make ``average``; False if they can't."""
    if _computed(parametrization).shape != average.shape:
        return False
    original = next(parametrization.parameters(recurse=False))
    try:
        # A clone, as the originals may become views of it.
        value = average.detach().to(original.dtype, copy=True)
        parametrization.right_inverse(value)  # type: ignore[operator]
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True
