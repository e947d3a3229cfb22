"""Notices values that other code writes into an average before its first update."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.engine.versions import version_of
from ema_fused.modules.module_pairs import Kind, slots_of


class FirstValues:
    """The averaged parameters as they were made, to tell whether other code has written them since.

    An average's first update copies the model; an average that was loaded before it must not be
    lost to that. Told by the objects and their version counters, so ``load_state_dict`` and
    ``copy_`` are noticed, a write through ``.data`` isn't. Who writes ``steps`` too (a whole state,
    or the broadcast of DistributedDataParallel) has said how many updates the values are of: that
    isn't counted. Code of the package that writes the averages itself calls :meth:`look` before and
    :meth:`renew` after.

    Args:
        buffers: of the averaged model, ``steps`` among them.
        written: whether the parameters have been written already.
    """

    def __init__(self, buffers: Mapping[str, Tensor | None], *, written: bool = False) -> None:
        self._buffers = buffers
        self._written = written
        self._noted: dict[str, tuple[Tensor, int]] = {}
        self._steps: tuple[Tensor | None, int] = (None, 0)

    def note(self, averaged: nn.Module, shared: Collection[str]) -> None:
        """Takes the present values of ``averaged`` for those that it was made with.

        Args:
            shared: names of parameters that share the model's memory; they aren't watched.
        """
        self._written = False
        parameters = _parameters(averaged)
        self._take({name: parameters[name] for name in parameters if name not in shared})

    def renew(self, averaged: nn.Module) -> None:
        """Takes the present values of what is watched; a write that :meth:`look` saw still counts.

        For code that has written in place; averages on the meta device may have been allocated.
        """
        if any(parameter.is_meta for parameter, _ in self._noted.values()):
            self._take_all(averaged)
        else:
            self._take({name: parameter for name, (parameter, _) in self._noted.items()})

    def start_again(self, averaged: nn.Module, shared: Collection[str]) -> None:
        """As :meth:`note`, unless the watch has ended: all values are accounted for now."""
        if self._written:
            self.note(averaged, shared)
        elif self._noted:
            self._take_all(averaged)

    def _take_all(self, averaged: nn.Module) -> None:
        present = _parameters(averaged)
        self._take({name: present[name] for name in self._noted if name in present})

    def _take(self, parameters: dict[str, Tensor]) -> None:
        self._noted = {name: (tensor, version_of(tensor)) for name, tensor in parameters.items()}
        steps = self._buffers.get("steps")
        self._steps = (steps, 0 if steps is None else version_of(steps))

    def forget(self) -> None:
        """Ends the watch and lets go of the tensors: the first update has been made."""
        self._written = False
        self._noted = {}

    def look(self, averaged: nn.Module) -> bool:
        """Whether other code has written any of them, and not ``steps``."""
        if self._noted and self._differ(averaged):
            if self._steps_were_written():
                self._take_all(averaged)
            else:
                self._written = True
                self._noted = {}
        return self._written

    def _differ(self, averaged: nn.Module) -> bool:
        present = _parameters(averaged)
        for name, (noted, version) in self._noted.items():
            now = present.get(name)
            if now is noted:
                if version_of(noted) != version:
                    return True
            # Memory alone (to_empty() of an average on the meta device) is no value.
            elif now is not None and not (noted.is_meta and version_of(now) == 0):
                return True
        return False

    def _steps_were_written(self) -> bool:
        noted, version = self._steps
        now = self._buffers.get("steps")
        # A buffer that was moved or converted is another object, and not written.
        return now is not None and version_of(now) > (version if now is noted else 0)


def _parameters(averaged: nn.Module) -> dict[str, Tensor]:
    slots = slots_of(averaged, leave=(Kind.BUFFER, Kind.CACHE))
    return {name: slot.tensor for name, slot in slots.items() if not is_lazy(slot.tensor)}
