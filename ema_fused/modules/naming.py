"""Which tensor of a model belongs to which of its average, whatever the model is wrapped in.

Wrappers put a component of their own into every name: DistributedDataParallel and DataParallel
``module.``, torch.compile ``_orig_mod.``, activation checkpointing ``_checkpoint_wrapped_module.``,
FSDP1 ``_fsdp_wrapped_module.``. They come and go after the average was made, and around
submodules too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

_SHOWN = 6


def without_wrappers(name: str) -> str:
    """``name`` without the path components that wrappers add: ``module.a._orig_mod.b`` is ``a.b``.

    The last component is the tensor's own and stays.
    """
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [last])


def match_names(averaged: Mapping[str, bool], source: Mapping[str, bool]) -> dict[str, str]:
    """Pairs the names of two modules, one to one.

    Names that are equal as they stand are paired as they stand. Otherwise wrappers around the whole
    of either module are taken off, level by level; then every component that looks like a
    wrapper's, on both sides. The first of these views under which all names agree is taken, for all
    names alike, so a submodule that is itself called ``module`` is never taken for a wrapper in
    silence.

    Args:
        averaged: for each name of the averaged model, whether it must find a partner.
        source: the same for the model that is averaged.

    Returns:
        For each averaged name its source name, in the order of ``averaged``. Names that need no
        partner and have none are left out.

    Raises:
        KeyError: names that must match and don't (all views failed), or that can't be told apart
            once wrappers are taken off.
    """
    views = [(a, s) for a in _unwrapped(averaged) for s in _unwrapped(source)]
    short = _shortened(averaged), _shortened(source)
    if short[0] is not None and short[1] is not None:
        views.append((short[0], short[1]))
    for a, s in views:
        if not _missing(a, s, averaged) and not _missing(s, a, source):
            return {a[view]: s[view] for view in a if view in s}
    raise KeyError(_explain(averaged, source, *views[-1], ambiguous=None in short))


def _unwrapped(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Views (short name -> name) with 0, 1, ... leading components that all names share removed."""
    view = {name: name for name in names}
    while True:
        yield view
        first = {short.partition(".")[0] for short in view}
        if len(first) != 1 or not first <= WRAPPERS or any("." not in short for short in view):
            return
        view = {short.partition(".")[2]: name for short, name in view.items()}


def _shortened(names: Iterable[str]) -> dict[str, str] | None:
    """The view without any wrapper's component; None where two names become one."""
    names = list(names)
    view = {without_wrappers(name): name for name in names}
    return view if len(view) == len(names) else None


def _missing(
    view: dict[str, str], other: dict[str, str], required: Mapping[str, bool]
) -> list[str]:
    """Names of ``view`` that must have a partner in ``other`` and have none."""
    return [name for short, name in view.items() if short not in other and required[name]]


def _explain(
    averaged: Mapping[str, bool],
    source: Mapping[str, bool],
    a: dict[str, str],
    s: dict[str, str],
    *,
    ambiguous: bool,
) -> str:
    missing, unexpected = _missing(a, s, averaged), _missing(s, a, source)
    told_apart = (
        "Removing wrappers' components (module., _orig_mod.) from all names would make different "
        "tensors equal, so they weren't removed. "
        if ambiguous
        else ""
    )
    return (
        f"the model doesn't match its average by name: missing from the model: {_list(missing)}; "
        f"unexpected in the model: {_list(unexpected)}. {told_apart}"
        f"Pass the model that was averaged (wrapped or not), or build a new average if the model "
        f"has gained or lost layers, parameters or buffers since"
    )


def _list(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
