"""timm's ``ModelEmaV2`` and ``ModelEmaV3`` with our update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ema_fused.adapters.following import Options, pairing_of
from ema_fused.engine.graphs import outside_graphs
from ema_fused.frameworks import missing
from ema_fused.modules.module_pairs import Kind

try:
    from timm.utils import model_ema as original
except ImportError as error:
    raise missing("timm", "timm", error) from error

__all__ = ["ModelEmaV2", "ModelEmaV3"]


class ModelEmaV2(original.ModelEmaV2):  # type: ignore[misc]
    """timm's ``ModelEmaV2``: all of ``update`` is one launch per device.

    The results are bitwise the original's if model and average have the same dtype (in float64,
    with a decay below 0.5, the last bits may differ). With two dtypes it computes in the wider one,
    while the original rounds each product to the dtype of its tensor.

    Better than the original: tensors are paired by name, ignoring wrappers; dtypes and devices may
    differ; tied weights are averaged once, not once for each name; integers are copied, while the
    original averages and truncates them. Non-persistent buffers are left alone, as in the original.

    Arguments, methods, attributes and ``state_dict`` as timm's. Only ``update`` is replaced.

    Raises from ``update``:
        KeyError: names don't match.
        ValueError: shapes differ.
        TypeError: one side of a pair is floating-point and the other isn't.
        If an error is raised, the averages are unchanged.
    """

    @outside_graphs
    def update(self, model: nn.Module) -> None:
        """Updates the average with the current weights of ``model``."""
        pairing = pairing_of(self, self.module, model, update_buffers=True, options=_options_of_v2)
        pairing.average_(1.0 - self.decay)


def _options_of_v2() -> Options:
    return {"arithmetic": "products", "leave": (Kind.CACHE,)}


class ModelEmaV3(original.ModelEmaV3):  # type: ignore[misc]
    """timm's ``ModelEmaV3``: all of ``update`` is one launch per device.

    The results are bitwise the original's on equal dtypes and in float32 averages of 16-bit models,
    except with stochastic rounding: bfloat16 averages are rounded up and down with the original's
    probabilities, but by other random bits, which take no memory. The bits depend on
    ``stochastic_rounding_seed``, the tensor's index in the model, and a step. This is the ``step``
    passed to ``update``, or one more than the last step if ``step`` isn't larger than that. So a
    run that resumes with its steps is bitwise the same on any devices. Without steps the count
    restarts, as timm's generator does, whose state is in no ``state_dict`` either. If a model has
    both float16 and bfloat16 averages, both are rounded stochastically.

    Better than the original: as for :class:`ModelEmaV2`, and complex tensors are averaged, not
    copied. ``foreach`` matters only for averages of another dtype than the model's: the original
    has two formulas for these.

    Arguments, methods, attributes and ``state_dict`` as timm's. Only ``update`` is replaced.

    Raises from ``update``: as :class:`ModelEmaV2`.
    """

    _rounding_step = -1  # the last counter of random bits

    @outside_graphs
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Updates the average with the current weights of ``model``, by the decay of ``step``."""
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
        # Never the same step twice: equal random bits would round in the same direction each time.
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
        # The original can't lerp a pair of two dtypes, and then uses the two-step formula for all.
        in_two_steps = self.foreach and any(a != s for a, s in dtypes) and not at_random
        return {
            "arithmetic": "axpby" if in_two_steps else "lerp",
            "rounding": "stochastic" if at_random else "nearest",
            # If buffers are only copied, the original copies all, non-persistent ones too.
            "leave": () if self.exclude_buffers else (Kind.CACHE,),
            "caches_are_buffers": self.exclude_buffers,
        }

    def _averaged_in(self, module: nn.Module) -> Iterator[Tensor]:
        yield from module.parameters()
        if not self.exclude_buffers:
            yield from module.buffers()


def _first_dtype(module: nn.Module) -> torch.dtype | None:
    """The first parameter's dtype; it changes when a module is converted in place."""
    return next((parameter.dtype for parameter in module.parameters()), None)
