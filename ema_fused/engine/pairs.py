"""Which pairs (averaged tensor, source tensor) are valid, and the errors for those that aren't.

The compiled inspection accepts the ordinary pairs in bulk. The others are checked here: each is
either refused with an error or left to ``foreach``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

MAX_AVERAGES = 8  # of one source


def label(index: int, names: Sequence[str] | None) -> str:
    """The name of a pair in messages: the parameter's name, or its index without names."""
    return f"pair {index}" if names is None else f"{names[index]!r}"


def labels_of(names: list[str] | None, pairs: int, averages: int) -> list[str] | None:
    """The names of all pairs in messages; with several averages they say which average."""
    if averages == 1:
        return names
    own = [f"pair {i}" for i in range(pairs)] if names is None else names
    return [f"{name} of average {k}" for k in range(averages) for name in own]


def check_lists(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Raises ValueError unless the lists are equally long, TypeError if one isn't a list."""
    check_list(averaged, "averaged")
    check_list(source, "source")
    if len(averaged) != len(source):
        raise ValueError(
            f"averaged has {len(averaged)} tensors and source has {len(source)}: pair "
            f"{min(len(averaged), len(source))} is incomplete; they must pair up one to one"
        )


def check_items(what: str, items: object, pairs: int) -> None:
    """Raises TypeError unless ``items`` is None or a list, ValueError unless of one item a pair."""
    if items is not None and not isinstance(items, Sequence):
        raise TypeError(f"{what} is {items!r}; a list of one item a pair is expected")
    if items is not None and len(items) != pairs:
        raise ValueError(f"{what} has {len(items)} items for {pairs} pairs")


def check_list(tensors: object, which: str) -> None:
    """Raises TypeError unless ``tensors`` is a list or another sequence."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{which} is one tensor; a list of tensors is expected: [{which}]")
    if isinstance(tensors, Mapping):
        raise TypeError(
            f"{which} is a {type(tensors).__name__}; a list of tensors is expected: "
            f"list({which}.values())"
        )
    if not isinstance(tensors, Sequence) or isinstance(tensors, str):
        hint = f": list({which})" if isinstance(tensors, Iterable) else ""
        raise TypeError(
            f"{which} is a {type(tensors).__name__}; a list of tensors is expected{hint}"
        )


def as_several(
    averaged: Sequence[Tensor] | Sequence[Sequence[Tensor]],
) -> list[Sequence[Tensor]]:
    """``averaged`` as a list of lists: one list per average of the source."""
    check_list(averaged, "averaged")
    if not averaged or not isinstance(averaged[0], (list, tuple)):
        return [averaged]  # type: ignore[list-item]
    for k, one in enumerate(averaged):
        if not isinstance(one, (list, tuple)):
            raise TypeError(
                f"averaged is a list of lists, and its item {k} is a {type(one).__name__}; a list "
                f"of tensors for each average is expected"
            )
    if len(averaged) > MAX_AVERAGES:
        raise ValueError(
            f"{len(averaged)} averages of one source; at most {MAX_AVERAGES} are updated in one "
            f"pass. Make a Plan for the others"
        )
    return list(averaged)  # type: ignore[arg-type]


def _check_tensor(tensor: object, which: str, pair: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{pair}: the {which} is a {type(tensor).__name__}; a torch.Tensor is expected"
        )
    kind = type(tensor).__name__
    if hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{pair}: the {which} is a {kind}, whose elements are spread over a device mesh; "
            f"pass the local shards of both sides: tensor.to_local()"
        )
    if tensor.device.type == "meta":
        raise ValueError(
            f"{pair}: the {which} is on the meta device and has no elements to average; "
            f"materialise it first: module.to_empty(device=...) and load its weights"
        )
    if kind in ("FakeTensor", "FunctionalTensor"):
        raise TypeError(
            f"{pair}: the {which} is a {kind}, a stand-in without elements; "
            f"call this outside of tracing"
        )
    if tensor.is_nested:
        raise TypeError(f"{pair}: the {which} is a nested tensor; pass its values: tensor.values()")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{pair}: the {which} has layout {tensor.layout}; a strided tensor is expected: "
            f"tensor.to_dense()"
        )
    if tensor.is_quantized:
        raise TypeError(
            f"{pair}: the {which} is quantized; a plain tensor is expected: tensor.dequantize()"
        )


def check_pair(averaged: Tensor, source: Tensor, pair: str) -> None:
    """Raises if no backend can serve this pair.

    Raises:
        TypeError: not a tensor, or of a kind without plain strided elements.
        ValueError: shapes differ, no data (meta), or the averaged tensor overlaps itself.
    """
    _check_tensor(averaged, "averaged tensor", pair)
    _check_tensor(source, "source", pair)
    if averaged.shape != source.shape:
        raise ValueError(
            f"{pair}: the averaged tensor has shape {tuple(averaged.shape)} and the source "
            f"{tuple(source.shape)}; they must be equal"
        )
    for size, stride in zip(averaged.shape, averaged.stride(), strict=True):
        if size > 1 and stride == 0 and averaged.numel() > 0:
            raise ValueError(
                f"{pair}: several elements of the averaged tensor share one place in memory "
                f"(shape {tuple(averaged.shape)}, strides {averaged.stride()}); an expanded tensor "
                f"can't be written: averaged.contiguous()"
            )


def can_average(averaged: Tensor, source: Tensor) -> bool:
    """Whether the pair has an average: floating-point (in 16 bits or more), or complex."""
    if averaged.is_complex() or source.is_complex():
        return averaged.dtype == source.dtype
    if averaged.itemsize == 1:
        return False  # 8 bits would lose every change
    return averaged.is_floating_point() and source.is_floating_point()


_PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def without_average(averaged: Sequence[Tensor], source: Sequence[Tensor]) -> list[bool] | None:
    """One flag per pair: True if it can only be copied. None if all pairs can be averaged."""
    if {tensor.dtype for tensor in (*averaged, *source)} <= _PLAIN:  # usual, and quick to check
        return None
    flags = [not can_average(a, s) for a, s in zip(averaged, source, strict=True)]
    return flags if any(flags) else None


def refuse_average(averaged: Tensor, source: Tensor, pair: str) -> TypeError:
    """The error for a pair that lerp_ can't average."""
    return TypeError(
        f"{pair}: {averaged.dtype} (averaged) and {source.dtype} (source) have no average; "
        f"floating-point tensors are expected, the averaged one of at least 16 bits. To carry such "
        f"tensors along, copy_() them"
    )


def refuse_swap(averaged: Tensor, source: Tensor, pair: str) -> TypeError:
    """The error for a pair that swap_ can't exchange."""
    return TypeError(
        f"{pair}: {averaged.dtype} (averaged) and {source.dtype} (source) can't be swapped without "
        f"losing bits; equal dtypes are expected"
    )


def overlap_error(pair: str, other: str, what: str) -> ValueError:
    """The error for two pairs that share memory."""
    return ValueError(
        f"{pair} and {other}: {what}, so the result would depend on the order of the updates; "
        f"pass one of the two, or make one a copy: tensor.clone()"
    )
