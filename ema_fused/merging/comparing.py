"""What several checkpoints have in common, and every difference between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ema_fused.merging.recognising import Checkpoint
from ema_fused.merging.stored_tensors import StoredTensor

_LISTED = 1000  # differences in one message; more are counted


@dataclass(frozen=True)
class Common:
    """The tensors to merge.

    Attributes:
        tensors: by name those of all checkpoints, in their order.
        tied: for each further name of a tensor that is tied in all of them, its name.
        left_out: names of one of them that are in none of these, because it was asked for.
    """

    tensors: dict[str, tuple[StoredTensor, ...]]
    tied: dict[str, str]
    left_out: list[str]


def common(
    checkpoints: Sequence[Checkpoint], *, ignore: str | None = None, only_common: bool = False
) -> Common:
    """Finds the tensors of each name in all checkpoints.

    Args:
        checkpoints: at least one.
        ignore: a regular expression; names in which it is found are left out.
        only_common: leave out what differs, instead of raising.

    Raises:
        ValueError: names, shapes or dtypes differ, with all differences; or nothing is left; or
            ``ignore`` is no regular expression.
    """
    every = [_by_all_names(checkpoint) for checkpoint in checkpoints]
    names = list(dict.fromkeys(name for one in every for name in one))
    left_out = []
    if ignore is not None:
        try:
            pattern = re.compile(ignore)
        except re.error as error:
            raise ValueError(f"ignore is no regular expression ({error}): {ignore!r}") from error
        left_out = [name for name in names if pattern.search(name)]
        names = [name for name in names if not pattern.search(name)]
    differences = {
        name: text for name in names if (text := _difference(name, every, checkpoints)) is not None
    }
    if differences and not only_common:
        raise ValueError(
            f"the checkpoints differ in {len(differences)} tensors, and nothing was written; "
            f"ignore=REGEX (--ignore) or only_common (--only-common) leaves tensors out:"
            + listed(list(differences.values()))
        )
    names = [name for name in names if name not in differences]
    if not names:
        raise ValueError("the checkpoints have no tensor in common that is left to merge")
    ties = _ties_of_all(checkpoints, names)
    tensors = {name: tuple(one[name] for one in every) for name in names if name not in ties}
    return Common(tensors, ties, [*left_out, *differences])


def _by_all_names(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors by each of their names, tied ones too."""
    tensors = dict(checkpoint.tensors)
    return tensors | {name: tensors[kept] for name, kept in checkpoint.tied.items()}


def _difference(
    name: str, every: Sequence[dict[str, StoredTensor]], checkpoints: Sequence[Checkpoint]
) -> str | None:
    """What differs in the tensors of one name, if anything does."""
    kinds: dict[str, list[str]] = {}
    for one, checkpoint in zip(every, checkpoints, strict=True):
        found = one.get(name)
        kind = "not there" if found is None else f"{found.dtype} {list(found.shape)}"
        kinds.setdefault(kind, []).append(str(checkpoint.path))
    if len(kinds) == 1:
        return None
    told = "; ".join(f"{kind} in {some(paths)}" for kind, paths in kinds.items())
    return f"{name!r}: {told}"


def listed(differences: Sequence[str]) -> str:
    """The differences as lines of a message, of very many the first."""
    more = [f"and {len(differences) - _LISTED} more"] if len(differences) > _LISTED else []
    return "".join(f"\n  {one}" for one in [*differences[:_LISTED], *more])


def some(paths: Sequence[str]) -> str:
    """The paths in a message, of many the first."""
    return ", ".join(paths) if len(paths) <= 3 else f"{paths[0]} and {len(paths) - 1} others"


def _ties_of_all(checkpoints: Sequence[Checkpoint], names: list[str]) -> dict[str, str]:
    """The ties that all checkpoints have. What one of them keeps apart stays apart."""
    groups: dict[tuple[str, ...], str] = {}
    ties = {}
    for name in names:
        kept = tuple(checkpoint.tied.get(name, name) for checkpoint in checkpoints)
        first = groups.setdefault(kept, name)
        if first != name:
            ties[name] = first
    return ties
