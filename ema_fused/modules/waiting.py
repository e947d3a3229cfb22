"""A module whose tensors may be written in the background: reading them waits first."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Reader(Protocol):
    """What has updates that may still be reading a model."""

    def wait_until_read(self) -> None: ...


_beside: weakref.WeakSet[Reader] = weakref.WeakSet()


def reads_beside(averaged: Reader) -> None:
    """Registers ``averaged`` as one whose updates run in parallel with training."""
    _beside.add(averaged)


def wait_until_all_have_read() -> None:
    """Waits until no update reads any model, so that models may be written.

    Raises:
        RuntimeError: an offloaded update failed; all others have been waited for nevertheless.
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
    """Calls :meth:`flush` before it gives access to its ``module``, its tensors or its state.

    It also remembers having done so: from then on its tensors may be part of a graph of autograd.
    """

    _given_away = False

    def _give_away(self) -> None:
        """Called before tensors are handed out."""
        self.flush()
        if not self._given_away:
            self._given_away = True

    def flush(self) -> None:
        """Waits until all updates are in the tensors."""
        raise NotImplementedError

    def wait_until_read(self) -> None:
        """Waits until the model may be written."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        """The averaged copy; waits for unfinished updates first."""
        self._give_away()
        averaged = self._modules["module"]
        assert averaged is not None
        return averaged

    def named_parameters(
        self, *arguments: Any, **options: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; waits for unfinished updates first."""
        self._give_away()
        return super().named_parameters(*arguments, **options)

    def named_buffers(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        """As of any module; waits for unfinished updates first."""
        self._give_away()
        return super().named_buffers(*arguments, **options)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; waits for unfinished updates first."""
        self._give_away()
        return super().named_children()

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; waits for unfinished updates first."""
        self._give_away()
        found: Iterator[tuple[str, nn.Module]] = super().named_modules(*arguments, **options)
        return found

    def _apply(self, *arguments: Any, **options: Any) -> WaitingModule:
        self.flush()
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._give_away()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        self.flush()
        if local_metadata.get("assign_to_params_buffers", False):
            _leave_inference(state_dict)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _leave_inference(state_dict: dict[str, Any]) -> None:
    """Copies inference tensors, which could never be updated outside inference mode."""
    with torch.inference_mode(False):
        for name, value in state_dict.items():
            if isinstance(value, Tensor) and value.is_inference():
                state_dict[name] = value.clone()
