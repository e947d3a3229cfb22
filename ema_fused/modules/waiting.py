"""A module whose tensors may be being written just now: whatever reads them waits first."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Averages whose updates may still be reading their models.
_beside: weakref.WeakSet[WaitingModule] = weakref.WeakSet()


def reads_beside(averaged: WaitingModule) -> None:
    """Notes that updates of ``averaged`` run beside the training."""
    _beside.add(averaged)


def wait_until_all_have_read() -> None:
    """Waits until a model may be written, whichever averages it has.

    Raises:
        RuntimeError: an offloaded update of one of them failed; all have been waited for then.
    """
    failed: RuntimeError | None = None
    for averaged in list(_beside):
        try:
            averaged.wait_until_read()
        except RuntimeError as error:
            failed = error
    if failed is not None:
        raise failed


class WaitingModule(nn.Module):
    """Waits, by :meth:`flush`, before it hands out its ``module``, its tensors or its state."""

    def flush(self) -> None:
        """Waits until the tensors hold what they are to hold."""
        raise NotImplementedError

    def wait_until_read(self) -> None:
        """Waits until the model may be written."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        """The averaged copy; waits for an update that is under way."""
        self.flush()
        averaged = self._modules["module"]
        assert averaged is not None
        return averaged

    def named_parameters(
        self, *arguments: Any, **options: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; waits for an update that is under way."""
        self.flush()
        return super().named_parameters(*arguments, **options)

    def named_buffers(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        """As of any module; waits for an update that is under way."""
        self.flush()
        return super().named_buffers(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> WaitingModule:
        self.flush()
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.flush()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.flush()
        super()._load_from_state_dict(*arguments)
