"""The latest checkpoints of a model in host memory, and their mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.engine.dtensors import local
from ema_fused.engine.undisturbed import undisturbed
from ema_fused.modules.beside import drop, put
from ema_fused.modules.module_pairs import Kind, Pair, Slot, slots_of
from ema_fused.modules.sharding import converted

# So many elements are summed at a time: in float64 they stay in a core's cache. On their way to a
# device they are more, as each piece is a copy.
_AT_ONCE, _AT_ONCE_TO_A_DEVICE = 2**17, 2**22


class _Checkpoint(nn.Module):
    """The values of one step, under the names of the averages."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: slot.tensor for name, slot in slots_of(self).items()}


class CheckpointWindow(nn.Module):
    """The latest ``k`` checkpoints of what is averaged, the oldest first.

    They are in host memory (pinned where CUDA is available) and in the dtypes of the model, and
    stay there when the module around them is moved or converted. All ``k`` are allocated from the
    start, so that a state has the same keys at every step: ``filled`` and ``0.*`` to ``k - 1.*``.

    Args:
        k: how many, at least 1.

    Attributes:
        filled: int64 scalar buffer, how many hold values.
        is_ahead: whether a checkpoint was taken since the mean was written.
        was_missing: whether the state that was loaded last had no window.
    """

    filled: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("filled", torch.tensor(0, device="cpu"))
        for i in range(k):
            self.add_module(str(i), _Checkpoint())
        self.is_ahead = False
        self.was_missing = False
        self._on_their_way: list[torch.cuda.Event] = []  # copies from a device

    def __repr__(self) -> str:
        return f"{type(self).__name__}(k={len(self._modules)}, filled={int(self.filled)})"

    def _checkpoints(self) -> list[_Checkpoint]:
        return list(self._modules.values())  # type: ignore[arg-type]

    def _apply(self, *_: Any, **__: Any) -> CheckpointWindow:
        """Moves and converts nothing."""
        return self

    @torch.no_grad()
    @torch.inference_mode(False)
    def hold(self, averages: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        """Makes room for the values of ``averages``; what has room keeps its values.

        A tensor without room gets the average's value in all checkpoints, so that the mean of these
        stays what it is.

        Args:
            averages: by name, each tensor once; sharded or not.
            dtypes: of their values in the window.
        """
        self.wait()
        for checkpoint in self._checkpoints():
            present = checkpoint.tensors()
            for name in present.keys() - averages.keys():
                drop(checkpoint, name)
            for name, average in averages.items():
                room = present.get(name)
                if room is None or room.shape != average.shape or local(room).is_meta:
                    put(checkpoint, name, converted(average, "cpu", dtypes[name], pinned=True))

    def forget(self, names: Sequence[str]) -> None:
        """Takes the values of these averages out of all checkpoints."""
        for checkpoint in self._checkpoints():
            for name in checkpoint.tensors().keys() & set(names):
                drop(checkpoint, name)

    def take(self, pairs: Sequence[Pair], *, alone: bool) -> None:
        """Copies the sources into a checkpoint, the place of the oldest one if all are filled.

        From a CUDA device it is a copy on the current stream, and the host doesn't wait for it.

        Args:
            pairs: whose averages the window has room for, and whose shapes are checked.
            alone: let go of all other checkpoints.
        """
        checkpoints = self._checkpoints()
        filled = 0 if alone else int(self.filled)
        is_full = filled == len(checkpoints)
        place = checkpoints[0 if is_full else filled].tensors()
        into = [local(place[pair.name]).detach() for pair in pairs]
        sources = [pair.source.detach() for pair in pairs]

        def copy() -> None:
            with torch.no_grad():
                if into:
                    torch._foreach_copy_(into, sources, non_blocking=True)
                self.filled.fill_(min(filled + 1, len(checkpoints)))
            if is_full:
                self._put_in_order([*checkpoints[1:], checkpoints[0]])
            self.is_ahead = True
            for device in {source.device for source in sources if source.is_cuda}:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
                self._on_their_way.append(event)

        # An interrupt between the copy and the new order would leave values in another's place.
        undisturbed(copy)

    @torch.no_grad()
    def restart(self, averages: Mapping[str, Slot]) -> None:
        """Lets go of all checkpoints, and takes the averages for the first one."""
        self.wait()
        for name, tensor in self._checkpoints()[0].tensors().items():
            local(tensor).detach().copy_(local(averages[name].tensor).detach())
        self.filled.fill_(1)
        self.is_ahead = False

    @torch.no_grad()
    def write_mean(self, averages: Mapping[str, Slot]) -> None:
        """Writes the mean of the checkpoints into the averages.

        It is summed up from all of them each time, in float64, from the oldest to the latest, and
        rounded once. A running sum would keep the roundings of checkpoints that have left it, and
        drift from the mean of the window.
        """
        self.wait()
        held = [one.tensors() for one in self._checkpoints()[: int(self.filled)]]
        for name in held[0] if held else ():
            slot = averages[name]
            values = [local(one[name]).detach() for one in held]
            _write_mean(values, local(slot.tensor).detach(), mends=slot.kind is not Kind.PARAMETER)
        self.is_ahead = False

    def wait(self) -> None:
        """Waits until the values of all checkpoints have arrived on the host."""
        while self._on_their_way:
            self._on_their_way.pop().synchronize()

    def _put_in_order(self, checkpoints: Sequence[_Checkpoint]) -> None:
        self._modules.update({str(i): one for i, one in enumerate(checkpoints)})

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return self.__dict__.copy()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes windows of any size: of a larger one, the latest checkpoints."""
        self.wait()
        ours = {
            f"{prefix}{i}.{name}": tensor
            for i, one in enumerate(self._checkpoints())
            for name, tensor in one.tensors().items()
        }
        self.was_missing = not any(key.startswith(prefix) for key in state_dict)
        if self.was_missing:
            state_dict |= {**ours, f"{prefix}filled": self.filled}
        count = state_dict.get(f"{prefix}filled")
        theirs = {key.removeprefix(prefix).partition(".")[0] for key in state_dict} - {"filled"}
        if count is not None and all(map(str.isdigit, theirs)):
            self._fit(state_dict, prefix, int(count), len(theirs), ours)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _fit(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        count: int,
        size: int,
        ours: Mapping[str, Tensor],
    ) -> None:
        """Makes a state of a window of ``size``, ``count`` of it filled, one of this size."""
        own = len(self._checkpoints())
        if size == own:
            return
        kept = min(count, own)
        # What holds no values keeps what it has.
        fitting = {key: one for key, one in ours.items() if _number(key, prefix) >= kept}
        for key in [one for one in state_dict if one != f"{prefix}filled"]:
            value, place = state_dict.pop(key), _number(key, prefix) - (count - kept)
            if 0 <= place < kept:
                name = key.removeprefix(prefix).partition(".")[2]
                fitting[f"{prefix}{place}.{name}"] = value
        state_dict |= {**fitting, f"{prefix}filled": torch.tensor(kept)}
        self.is_ahead = kept < count


def _number(key: str, prefix: str) -> int:
    """That of the checkpoint that a key of a state is of."""
    return int(key.removeprefix(prefix).partition(".")[0])


def _write_mean(values: Sequence[Tensor], into: Tensor, *, mends: bool) -> None:
    """Writes the mean of ``values`` into ``into``.

    Args:
        mends: elements whose mean is infinite or NaN get the latest value.
    """
    wide = torch.complex128 if into.is_complex() else torch.float64
    for *pieces, goal in _pieces([*values, into]):
        total = pieces[0].to(wide, copy=True)
        for piece in pieces[1:]:
            total.add_(piece)
        total.div_(len(pieces))
        if mends:
            total = torch.where(total.isfinite(), total, pieces[-1].to(wide))
        goal.copy_(total.to(goal.dtype))


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in pieces of the same elements, where their layouts allow it; else whole."""
    first, last = tensors[0], tensors[-1]
    layouts = {(one.stride(), one.is_conj(), one.is_neg()) for one in tensors}
    is_dense = torch.empty_like(first, device="meta").stride() == first.stride()
    if len(layouts) > 1 or not is_dense or type(last) is not Tensor:
        yield list(tensors)
        return
    flat = [one.as_strided((one.numel(),), (1,)) for one in tensors]
    size = _AT_ONCE if last.is_cpu else _AT_ONCE_TO_A_DEVICE
    for start in range(0, first.numel(), size):
        yield [one[start : start + size] for one in flat]
