"""State that modules keep beside tensors: an averaged copy takes it over from the model."""

from __future__ import annotations

import copy
import weakref

from torch import nn

from ema_fused.modules.naming import match_names


class ExtraState:
    """What ``get_extra_state`` of a model's modules returns, for the same modules of its copy.

    Taken over when the copy is looked at or saved, not at each update: some modules (Transformer
    Engine's) wait for the device to tell their state.

    Attributes:
        is_old: whether the model has been averaged since.
    """

    def __init__(self, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
        self._pairs = [(weakref.ref(ours), weakref.ref(theirs)) for ours, theirs in pairs]
        self.is_old = False

    @classmethod
    def between(cls, copied: nn.Module, model: nn.Module) -> ExtraState | None:
        """That of the modules that both have by the same name; None if there are none."""
        ours = _modules_with_state(copied)
        theirs = _modules_with_state(model) if ours else {}
        if not theirs:
            return None
        try:
            names = match_names(dict.fromkeys(ours, True), dict.fromkeys(theirs, True))
        except KeyError:  # names of tensors are what must match
            return None
        return cls([(ours[name], theirs[partner]) for name, partner in names.items()])

    def take_over_if_old(self) -> None:
        """Copies it, if the model has been averaged since the last time."""
        if self.is_old:
            self.take_over()

    def take_over(self) -> None:
        """Copies it, if the model still exists."""
        self.is_old = False
        for our_reference, their_reference in self._pairs:
            ours, theirs = our_reference(), their_reference()
            if ours is not None and theirs is not None:
                ours.set_extra_state(copy.deepcopy(theirs.get_extra_state()))


def _modules_with_state(root: nn.Module) -> dict[str, nn.Module]:
    """The modules that define both functions, by the name of their state."""
    return {
        f"{path}._extra_state" if path else "_extra_state": module
        for path, module in root.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
        and type(module).set_extra_state is not nn.Module.set_extra_state
    }
