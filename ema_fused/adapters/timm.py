"""timm's ``ModelEmaV2`` and ``ModelEmaV3`` with our update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ema_fused.adapters.following import Options, is_scripted, pairing_of
from ema_fused.frameworks import missing
from ema_fused.modules.module_pairs import Kind

try:
    from timm.utils import model_ema as original
except ImportError as error:
    raise missing("timm", "timm", error) from error

__all__ = ["ModelEmaV2", "ModelEmaV3"]


class ModelEmaV2(original.ModelEmaV2):  # type: ignore[misc]
    """timm's ``ModelEmaV2``: the whole of ``update`` is one launch a device.

    It gives the original's bits where model and average have one dtype (in float64, with a decay
    below 0.5, their last bits may differ). Of two dtypes the wider is computed in, where the
    original rounds each product to the dtype that it comes of.

    Better than there: tensors are paired by name, wrappers seen through, dtypes and devices may
    differ; tied weights are averaged once, not once for each name; integers follow by copy, where
    the original averages them and cuts off what is behind the point. Non-persistent buffers are
    left alone, as there. A model compiled by TorchScript takes the original's way.

    Arguments, methods, attributes and ``state_dict`` as timm's. All but ``update`` is its own.

    Raises from ``update``:
        KeyError: names don't match.
        ValueError: shapes differ.
        TypeError: one side of a pair is floating-point and the other isn't.
        The averages are unchanged then.
    """

    def update(self, model: nn.Module) -> None:
        """Takes the present weights of ``model`` into the average."""
        if is_scripted(self.module, model):
            super().update(model)
            return
        pairing = pairing_of(self, self.module, model, update_buffers=True, options=_options_of_v2)
        pairing.average_(1.0 - self.decay)


def _options_of_v2() -> Options:
    return {"arithmetic": "products", "leave": (Kind.CACHE,)}


class ModelEmaV3(original.ModelEmaV3):  # type: ignore[misc]
    """timm's ``ModelEmaV3``: the whole of ``update`` is one launch a device.

    It gives the original's bits on equal dtypes and in float32 averages of 16-bit models, but for
    stochastic rounding: bfloat16 averages are rounded up and down with the probabilities that they
    have there, by other random bits, which take no memory. They come of
    ``stochastic_rounding_seed``, of the tensor's place in the model, and of the step. The step is
    the one that ``update`` is given, or the one after the last where that has been passed already.
    So a run that is resumed with its steps goes on to the bit, whatever the devices are. Without
    steps the count begins again, as timm's generator does, which no ``state_dict`` holds either.
    Where a model has float16 averages beside bfloat16 ones, they are rounded in the same way.

    Better than there: as for :class:`ModelEmaV2`, and complex tensors are averaged, not copied.
    ``foreach`` matters for averages of another dtype than the model's, which two ways of writing
    the average go with there. A model compiled by TorchScript takes the original's way.

    Arguments, methods, attributes and ``state_dict`` as timm's. All but ``update`` is its own.

    Raises from ``update``: as :class:`ModelEmaV2`.
    """

    _rounding_step = -1  # what random bits were counted by last

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Takes the present weights of ``model`` into the average, by the decay of ``step``."""
        if is_scripted(self.module, model):
            super().update(model, step)
            return
        made_for = (
            self.foreach,
            self.stochastic_rounding,
            _first_dtype(self.module),
            _first_dtype(model),
        )
        pairing = pairing_of(
            self,
            self.module,
            model,
            update_buffers=not self.exclude_buffers,
            options=lambda: self._options(model),
            made_for=made_for,
        )
        # Never the same twice: equal random bits at every update would always round away the same.
        counted = self._rounding_step + 1 if step is None else max(step, self._rounding_step + 1)
        weight = 1.0 - self.get_decay(step)
        pairing.average_(weight, seed=self.stochastic_rounding_seed % 2**63, step=counted)
        self._rounding_step = counted

    def _options(self, model: nn.Module) -> Options:
        averages, sources = (self._averaged_in(module) for module in (self.module, model))
        dtypes = [
            (a.dtype, s.dtype)
            for a, s in zip(averages, sources, strict=False)
            if a.is_floating_point()
        ]
        at_random = self.stochastic_rounding and any(a == torch.bfloat16 for a, _ in dtypes)
        if self.stochastic_rounding:
            dtypes = [(a, s) for a, s in dtypes if a != torch.bfloat16]
        # The original can't lerp two dtypes at once, and takes this for all of them.
        in_two_steps = self.foreach and any(a != s for a, s in dtypes) and not at_random
        return {
            "arithmetic": "axpby" if in_two_steps else "lerp",
            "rounding": "stochastic" if at_random else "nearest",
            # Where buffers are copied the original goes over all of them.
            "leave": () if self.exclude_buffers else (Kind.CACHE,),
            "caches_are_buffers": self.exclude_buffers,
        }

    def _averaged_in(self, module: nn.Module) -> Iterator[Tensor]:
        yield from module.parameters()
        if not self.exclude_buffers:
            yield from module.buffers()


def _first_dtype(module: nn.Module) -> torch.dtype | None:
    """As a sign that a module has been converted in place."""
    return next((parameter.dtype for parameter in module.parameters()), None)
