"""Warnings about uses of an averaged model that lose time, precision or the training."""

from __future__ import annotations

from torch import nn

from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.notices import warn
from ema_fused.modules.module_pairs import differ
from ema_fused.modules.pairing import Pairing

_IN_VAIN_BEFORE_WARNING = 6


def of_first_copy(averaged: nn.Module, model: nn.Module) -> None:
    """Warns that averages without an update are swapped in, if ``model`` has changed since.

    Raises:
        KeyError: names don't match.
    """
    if differ(averaged, model):
        warn(
            "averages are swapped in before their first update: they are the weights that the "
            "model had when they were made, and it has changed since. Evaluate the model itself "
            "until then; or call update_parameters(model) from the first step on: with begin_step= "
            "the averages follow the model until averaging begins"
        )


class Advice:
    """The warnings about updates of one averaged model, once each.

    Each warning points to the line that called ``update_parameters()``.

    Attributes:
        in_vain: how many pairings in a row were used for a single update only.
    """

    def __init__(self) -> None:
        self.in_vain = 0
        self._warned_of_losses = False
        self._warned_of_waiting = False

    def count_in_vain(self, pairing: Pairing, before: Pairing | None) -> None:
        """Counts a new pairing; warns when several in a row were used for a single update only.

        Args:
            pairing: the new one.
            before: the one that it replaces; None if that one's model was garbage-collected.
        """
        self.in_vain += 1
        if self.in_vain != _IN_VAIN_BEFORE_WARNING:
            return
        why = "another model object is passed in turn"
        if before is not None:
            why = pairing.difference(before)
        warn(
            f"the model is walked again at every update ({why}), "
            f"which takes longer than averaging it. Write buffers in place, "
            f"buffer.copy_(value), and keep to one model object for each average",
            SlowPathWarning,
            stacklevel=4,
        )

    def of_waiting(self, pairing: Pairing, *, overlap: bool, asynchronous: bool) -> None:
        """Warns if ``overlap`` or ``offload`` can't hide the time of an update."""
        in_order = overlap and pairing.stream is None
        if self._warned_of_waiting or (asynchronous and not in_order):
            return
        self._warned_of_waiting = True
        why = (
            f"overlap=True has no effect: the averages are on {pairing.devices}, and it takes one "
            f"CUDA device, which has streams that run beside one another. Leave it out"
            if in_order
            else "update_parameters() waits until the update has read the model, so overlap=True "
            "or offload='cpu' hides nothing of it: nobody is known to wait before the next "
            "optimizer step. Use ema_fused.attach(optimizer, model, averaged), or pass "
            "asynchronous=True and call wait_until_read() before each step"
        )
        warn(why, SlowPathWarning, stacklevel=3)

    def of_losses(self, weight: float) -> None:
        """Warns that 16-bit averages hardly change with a momentum this small."""
        if weight == 0.0 or self._warned_of_losses:
            return
        self._warned_of_losses = True
        warn(
            f"averages are kept in 16 bits and the momentum is {weight:.3g}: changes this small "
            f"are mostly rounded away, and the average stays where it is. Pass "
            f"averaged_dtype=torch.float32, or rounding='stochastic'",
            stacklevel=4,
        )

    def of_loading(self, steps: int, weight: float | None) -> None:
        """Warns that an average without steps was loaded, and what becomes of it.

        Args:
            steps: how many there are; 0 or less.
            weight: of the model's values in the next average, if it is known.
        """
        known = (
            "" if weight is None else f" (the model's values have the weight {weight:.3g} there)"
        )
        warn(
            f"values were loaded into an average that had made no update (steps is {steps}): they "
            f"are kept, and averaging goes on from steps=1{known}. Load 'steps' with them, or set "
            f"it, averaged.steps.fill_(n), to go on from another; to start from the model instead, "
            f"call averaged.copy_from(model) after loading",
            stacklevel=5,
        )
