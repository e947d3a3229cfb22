"""What a state of an average holds, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ema_fused.merging.stored_tensors import StoredTensor

MODULE = "module."
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SHOWN = 6

Tensors = Mapping[str, Any]  # each a Tensor, or a StoredTensor: in a file, and not read yet


@dataclass(frozen=True)
class WarmUp:
    """How the decay grows at the beginning, as far as a state says it.

    Attributes:
        kind: ``"none"``: it is the same at every step; ``"ratio"``: at most ``(1 + n) / (10 + n)``;
            ``"power"``: at most ``1 - (1 + n / inv_gamma) ** -power``.
        after: steps before it begins, which copy.
        least: the decay is at least this.
    """

    kind: str
    after: int = 0
    least: float = 0.0
    inv_gamma: float = 1.0
    power: float = 2 / 3


@dataclass(frozen=True)
class AverageState:
    """The state of an average.

    Attributes:
        format: the name of its format, as ``--to`` takes it.
        averaged: the tensors of the average by the names that they have in the model, copied
            buffers among them; of a list without names (``unnamed``) none.
        raw: the weights of the model at the same time, if they are there too.
        steps: how many updates the average has had, the first copy included; None: not kept.
        counts_averages: ``steps`` leaves out calls that didn't average.
        decay: the weight of the average in an update; None: not kept.
        warm_up: None: not kept.
        parameters: which names are of parameters; None: not known.
        unnamed: the averages of a list, in the order of the parameters of the model.
        kind: of ours, whether it is a mean or goes by a momentum (``averages.kept_kind``).
        more: of ours, what else is in the state: ``window.*``, ``initial.*``, ``rounding_seed``.
        variant: which it is of several averages in one state, as a reader may know it.
        beside: what stands beside it in the same file, and belongs to no average.
        notes: what a reader should know.
        title: whose weights these are, where that is no format; empty: not known.
    """

    format: str
    averaged: Tensors
    raw: Tensors | None = None
    steps: int | None = None
    counts_averages: bool = False
    decay: float | None = None
    warm_up: WarmUp | None = None
    parameters: frozenset[str] | None = None
    unnamed: Sequence[Any] | None = None
    kind: str | None = None
    more: Tensors = field(default_factory=dict)
    variant: str = ""
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    title: str = ""
    key: str = field(default="", compare=False)

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor is one of the parameters; of buffers of unusual names it isn't known."""
        if self.parameters is not None:
            return name in self.parameters
        return not looks_like_buffer(name, self.averaged[name])


@dataclass(frozen=True)
class Wanted:
    """What a conversion is told beside the state.

    Attributes:
        averages_in: of mmcv's checkpoints: ``"parameters"`` or ``"buffers"`` hold the averages.
        names: of the model's parameters, in their order.
        folder: of the model, with the ``config.json`` that a folder needs.
    """

    averages_in: str | None = None
    names: Sequence[str] | None = None
    folder: Any = None


@dataclass(frozen=True)
class Built:
    """What a format writes.

    Attributes:
        tree: nested dictionaries.
        folder: the files of a folder instead, by name: tensors, or text.
        lost: what the format has no place for, and what was made up for it.
    """

    tree: Mapping[str, Any] = field(default_factory=dict)
    folder: Mapping[str, Any] | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A format of states of averages.

    Attributes:
        name: as ``--to`` takes it.
        title: whose it is.
        marks: what it is recognised by.
        read: the state in a dictionary; None: this isn't the format.
        build: the other way; None: the format can only be read, and ``--to`` doesn't take it.
        output: ``"file"``, ``"folder"`` or ``"either"``.
    """

    name: str
    title: str
    marks: str
    read: Callable[[Mapping[Any, Any], Wanted], AverageState | None]
    build: Callable[[AverageState, Wanted], Built] | None
    output: str = "file"


def is_tensor(value: object) -> bool:
    return isinstance(value, (Tensor, StoredTensor))


def whole(value: Any) -> Tensor:
    """A tensor in memory."""
    return value.tensor() if isinstance(value, StoredTensor) else value


def number(value: Any) -> int | None:
    """The integer in a number or a tensor of one element; None: it is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if is_tensor(value) and tuple(value.shape) in ((), (1,)):
        return int(whole(value).reshape(()).item())
    return None


def is_averageable(value: Any) -> bool:
    return bool(value.dtype.is_floating_point or value.dtype.is_complex)


def looks_like_buffer(name: str, tensor: Any) -> bool:
    """Whether it is a buffer, as far as can be told without the model: statistics and integers."""
    return name.rpartition(".")[2] in _STATISTICS or not is_averageable(tensor)


def tensors_in(state: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {
        name[len(prefix) :]: value
        for name, value in state.items()
        if isinstance(name, str) and name.startswith(prefix) and is_tensor(value)
    }


def names_beside(state: Mapping[Any, Any], *known: str) -> tuple[str, ...]:
    """The keys of a checkpoint that a conversion leaves behind."""
    return tuple(str(key) for key in state if key not in known)


def each_once(tensors: Tensors) -> Iterator[tuple[str, Any]]:
    """Tied tensors by their first name alone."""
    seen: set[Any] = set()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            identity: Any = place if tensor.numel() else id(tensor)
        else:
            identity = tensor
        if identity not in seen:
            seen.add(identity)
            yield name, tensor


def listed(names: Sequence[str]) -> str:
    """The first of them, for a message."""
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def raw_or_error(state: AverageState, format: str) -> Tensors:
    """The weights of the model, which some formats keep beside the average.

    Raises:
        ValueError: they aren't there, or aren't those of this average.
    """
    if state.raw is None:
        raise ValueError(
            f"{format} keeps the weights of the model beside the average, and they aren't in this "
            f"state; pass the checkpoint that has them by --raw (raw=)"
        )
    absent = [name for name in state.averaged if name not in state.raw]
    if absent:
        raise ValueError(
            f"the weights of the model lack what the average has: {listed(absent)}; pass those of "
            f"the same model by --raw (raw=)"
        )
    return state.raw


def count_or_one(state: AverageState, lost: list[str]) -> int:
    """``steps``, or 1 where it isn't known, which is noted."""
    if state.steps is None:
        lost.append(
            "the number of updates isn't in the source: it is 1, as of one value, so that warm-ups "
            "and means begin anew; --steps (steps=) sets it"
        )
        return 1
    return max(0, state.steps)


def note_of_decay(state: AverageState) -> list[str]:
    """What is lost in a format that keeps neither decay nor warm-up."""
    lost = []
    if state.decay is not None:
        lost.append(f"the decay {state.decay:g} (momentum {1 - state.decay:.6g}): set it anew")
    if state.warm_up is not None and state.warm_up.kind != "none":
        lost.append(f"the warm-up of the decay ({told(state.warm_up)}): set it anew")
    return lost


def told(warm_up: WarmUp) -> str:
    """A warm-up in words."""
    at_first = f" after {warm_up.after} steps" if warm_up.after else ""
    least = f", at least {warm_up.least:g}" if warm_up.least else ""
    if warm_up.kind == "power":
        return f"1 - (1 + n / {warm_up.inv_gamma:g}) ** -{warm_up.power:g}{at_first}{least}"
    if warm_up.kind == "ratio":
        return f"(1 + n) / (10 + n){at_first}{least}"
    return "none"
