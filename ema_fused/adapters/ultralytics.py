"""ultralytics' ``ModelEMA`` with our update."""

from __future__ import annotations

from torch import Tensor, nn

from ema_fused.adapters.following import KeptPlan, notes_of
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.plan import Plan
from ema_fused.frameworks import missing

try:
    from ultralytics.utils import torch_utils as original
except ImportError as error:
    raise missing("ultralytics", "ultralytics", error) from error

__all__ = ["ModelEMA"]


class ModelEMA(original.ModelEMA):  # type: ignore[misc]
    """ultralytics' ``ModelEMA``: all of ``update`` is one launch per device.

    As in the original, the floating-point tensors of the average's ``state_dict`` are averaged with
    those of the same names in the model, compiled or parallel; integers stay as they are, and what
    the model has beyond that (a distillation's teacher) isn't looked at. On equal dtypes the
    results are bitwise those of ultralytics 8.4 with torch 2.4 or later.

    Better than the original: tied weights are averaged once, not once for each name; dtypes and
    devices may differ within a pair; a model that is converted or moved in place, another model
    object and replaced tensors are followed, where the original goes on with the tensors of its
    first update; ``updates`` counts only what was done.

    Arguments, methods and attributes as ultralytics'. Only ``update`` is replaced.

    Raises from ``update``:
        KeyError: a name is missing from the model.
        ValueError: shapes differ.
        If an error is raised, the averages and ``updates`` are unchanged.
    """

    @outside_graphs
    def update(self, model: nn.Module) -> None:
        """Updates the average with the current weights of ``model``, unless it isn't enabled."""
        if not self.enabled:
            return
        source = original.unwrap_model(model)
        weight = 1 - self.decay(self.updates + 1)
        notes = notes_of(self)
        kept = notes.get("plan")
        if not (isinstance(kept, KeptPlan) and _went_by(kept, self.ema, source, weight)):
            kept = KeptPlan(self.ema, source, _plan)
            kept.plan.lerp_(weight)
            notes["plan"] = kept
        self.updates += 1
        if self.__dict__.get("_pairs") is not None:
            self._pairs = None  # of the original's updates before accelerate()


def _went_by(kept: KeptPlan, averaged: nn.Module, model: nn.Module, weight: float) -> bool:
    """Averages by a plan that was made earlier, if it still holds."""
    if not kept.holds(averaged, model):
        return False
    try:
        kept.plan.lerp_(weight)
    except ValueError:  # a module was converted in place
        return False
    return True


def _plan(averaged: nn.Module, model: nn.Module) -> Plan:
    # The tensors themselves, which may get other memory, and not views of it.
    ours, theirs = (module.state_dict(keep_vars=True) for module in (averaged, model))
    names = [
        name
        for name, value in ours.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    absent = [name for name in names if name not in theirs]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise KeyError(
            f"{', '.join(absent[:3])}{more}: in the average and missing from the model; pass the "
            f"model that the ModelEMA was made of, or make a new one of this model"
        )
    return Plan(
        [ours[name] for name in names],
        [theirs[name] for name in names],
        names=names,
        version_counters=True,  # of a module, which can be called
    )
