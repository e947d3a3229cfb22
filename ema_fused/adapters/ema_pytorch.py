"""ema-pytorch's ``EMA`` with our update."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_fused.adapters.following import KeptPlan, known_integer, notes_of
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.plan import Plan
from ema_fused.engine.versions import VersionCounters
from ema_fused.frameworks import missing
from ema_fused.modules.exchanging import tell_of_writes
from ema_fused.modules.naming import match_names

try:
    from ema_pytorch import ema_pytorch as original
except ImportError as error:
    raise missing("ema_pytorch", "ema_pytorch", error) from error

__all__ = ["EMA"]


class EMA(original.EMA):  # type: ignore[misc]
    """ema-pytorch's ``EMA``: each average is one launch per device, without synchronising.

    The results on equal dtypes are bitwise the original's. ``step`` and ``initted`` are cached on
    the host and written into their buffers; the decay is computed in float32 as in the original,
    but on the host. (If the buffers are on a GPU, the original computes it there, and its last bit
    may differ.)

    Tensors are paired by name, ignoring wrappers, while the original filters by name and pairs by
    order. ``use_foreach`` makes no difference. Dtypes and devices may differ within a pair, whether
    ``coerce_dtype`` and ``allow_different_devices`` allow it or not; a pair is computed in the
    wider of its two dtypes, without rounding the source first. Integers aren't updated, as in the
    original.

    All other options, arguments, methods, attributes and the ``state_dict`` are as in the original.
    If the model is no module, the result is the original's ``EMAPytree``.

    Raises from ``update`` and ``update_moving_average``:
        KeyError: names don't match.
        ValueError: shapes differ.
        If an error is raised, the averages and ``step`` are unchanged.
    """

    def get_current_decay(self) -> float:
        """The weight of the average in the next update, by the warm-up; doesn't synchronise."""
        step = known_integer(self, "step").read(self.step)
        # As a tensor, to round as the original does.
        epoch = torch.tensor(step, device="cpu").sub(self.update_after_step + 1).clamp(min=0.0)
        if not epoch > 0:
            return 0.0
        decay = 1 - (1 + epoch / self.inv_gamma).pow(-self.power)
        return float(decay.clamp(min=self.min_value, max=self.beta))

    @outside_graphs
    def update(self) -> None:
        """Counts a step, and copies or averages the model if either is due."""
        started, count = known_integer(self, "initted"), known_integer(self, "step")
        step = count.read(self.step)
        is_first = not started.read(self.initted)
        is_due = step % self.update_every == 0
        count.write(self.step, step + 1)
        try:
            if is_first:
                if self.ema_model is None:
                    self.init_ema()
                self.copy_params_from_model_to_ema()
                started.write(self.initted, True)
                return
            if is_due and step <= self.update_after_step:
                self.copy_params_from_model_to_ema()
                return
            if is_due:
                self.update_moving_average(self.ema_model, self.model)
        except Exception:
            count.write(self.step, step)
            raise
        every = self.update_model_with_ema_every
        if every is not None and step % every == 0:
            self.update_model_with_ema()

    def copy_params_from_model_to_ema(self) -> None:
        """Copies the model's tensors into the average."""
        super().copy_params_from_model_to_ema()
        VersionCounters(_tensors_of(self.ema_model)).increment()

    def copy_params_from_ema_to_model(self) -> None:
        """Copies the averages into the model."""
        super().copy_params_from_ema_to_model()
        tell_of_writes(VersionCounters(_tensors_of(self.model)))

    def update_model_with_ema(self, decay: float | None = None) -> None:
        """Copies the averages into the model, or moves the model towards them by ``decay``."""
        super().update_model_with_ema(decay)
        torch.clear_autocast_cache()  # the plan has counted the versions

    @outside_graphs
    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        """Updates ``ma_model`` with ``current_model``; by this step's decay if None is given."""
        if self.is_frozen:
            return
        if self.move_ema_to_online_device:
            device = original.get_module_device(current_model)
            if original.get_module_device(ma_model) != device:
                ma_model.to(device)
        weight = 1.0 - (self.get_current_decay() if current_decay is None else current_decay)
        place = "into the model" if ma_model is self.model else "into the average"
        notes = notes_of(self)
        chosen = _Chosen(
            self.parameter_names,
            self.buffer_names,
            self.ignore_names,
            self.ignore_startswith_names,
            self.param_or_buffer_names_no_ema,
        )
        kept = notes.get(place)
        if kept is not None and kept.holds(ma_model, current_model, chosen):
            try:
                kept.plan.lerp_(weight)
                return
            except ValueError:  # a module was converted in place
                pass
        # Copies, as the names may be changed in place.
        copies = _Chosen(*map(copy.copy, chosen))
        kept = KeptPlan(ma_model, current_model, copies.plan, made_for=copies)
        kept.plan.lerp_(weight)
        notes[place] = kept


class _Chosen(NamedTuple):
    """Which tensors are averaged and which are copied, by their names in the averaged copy."""

    parameters: Collection[str]
    buffers: Collection[str]
    ignored: Collection[str]
    ignored_prefixes: Collection[str]
    copied: Collection[str]

    def ignores(self, name: str) -> bool:
        return name in self.ignored or name.startswith(tuple(self.ignored_prefixes))

    def plan(self, averaged: nn.Module, model: nn.Module) -> Plan:
        ours, theirs = _numbers_in(averaged), _numbers_in(model)
        matched = match_names(
            {name: not self.ignores(name) for name in ours},
            {name: not self.ignores(name) for name in theirs},
        )
        names, copied = {*self.parameters, *self.buffers}, {*self.copied}
        # Either module may be the averaged copy, and the other one may be wrapped.
        pairs = [
            (name, source)
            for name, source in matched.items()
            if names & {name, source} and not self.ignores(name) and not self.ignores(source)
        ]
        return Plan(
            [ours[name] for name, _ in pairs],
            [theirs[source] for _, source in pairs],
            only_copy=[bool(copied & {name, source}) for name, source in pairs],
            names=[name for name, _ in pairs],
            version_counters=True,  # of a module, which can be called
        )


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _numbers_in(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that can be averaged: tied ones once, non-persistent buffers too."""
    return {
        name: tensor
        for name, tensor in chain(module.named_parameters(), module.named_buffers())
        if tensor.is_floating_point() or tensor.is_complex()
    }
