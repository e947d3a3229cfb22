"""Matches the tensors of a model and of its average by name, whatever wraps the model.

Each wrapper adds a component to every name: DistributedDataParallel and DataParallel ``module.``,
torch.compile ``_orig_mod.``, activation checkpointing ``_checkpoint_wrapped_module.``, FSDP1
``_fsdp_wrapped_module.``, opacus ``_module.``. Lightning Fabric has every tensor twice, under
``_original_module.`` and ``_forward_module.``. Wrappers may be added or removed after the average
was made, around submodules too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_original_module",
        "_module",
    }
)
_TWICE = ("_original_module", "_forward_module")

_SHOWN = 6


def without_wrappers(name: str) -> str:
    """``name`` without the path components that wrappers add: ``module.a._orig_mod.b`` is ``a.b``.

    The last component, the tensor's own name, is never removed.
    """
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [last])


def plain_names(names: Iterable[str]) -> set[str]:
    """``names`` without wrappers' components, which some wrappers leave out of states."""
    return {without_wrappers(name) for name in names}


def named_once(modules: Mapping[str, object]) -> list[str]:
    """The names of submodules without those that Lightning Fabric's wrapper gives a second time."""
    once, twice = _TWICE
    if not any(name.rpartition(".")[2] == twice for name in modules):
        return list(modules)
    repeated = [
        name
        for name in modules
        if name.rpartition(".")[2] == twice and name.removesuffix(twice) + once in modules
    ]
    return [
        name
        for name in modules
        if not any(name == one or name.startswith(f"{one}.") for one in repeated)
    ]


def plain_path(path: str) -> str:
    """The path of a module without wrappers' components; a wrapper has that of what it wraps."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def match_names(averaged: Mapping[str, bool], source: Mapping[str, bool]) -> dict[str, str]:
    """Pairs the names of two modules, one to one.

    If all names are equal, they are paired unchanged. Otherwise the leading components of wrappers
    around the whole of either module are removed, level by level; last, every component that looks
    like a wrapper's, on both sides. The first of these views in which all names match is used for
    all names, so a submodule that is itself called ``module`` isn't mistaken for a wrapper
    unnoticed.

    Args:
        averaged: for each name of the averaged model, whether it must have a partner.
        source: the same for the model that is averaged.

    Returns:
        The source name of each averaged name, in the order of ``averaged``. Names that need no
        partner and have none are left out.

    Raises:
        KeyError: names that must match don't match in any view, or become equal when wrappers are
            removed.
    """
    views = [(a, s) for a in _unwrapped(averaged) for s in _unwrapped(source)]
    short = _shortened(averaged), _shortened(source)
    if short[0] is not None and short[1] is not None:
        views.append((short[0], short[1]))
    for a, s in views:
        if not _missing(a, s, averaged) and not _missing(s, a, source):
            return {a[view]: s[view] for view in a if view in s}
    raise KeyError(_explain(averaged, source, *views[-1], ambiguous=None in short))


def common_names(averaged: Iterable[str], source: Iterable[str]) -> dict[str, str]:
    """The source name of each averaged name that has one, whatever wraps either module.

    Unlike :func:`match_names` it takes modules whose names differ otherwise too.
    """
    averaged, source = list(averaged), list(source)
    views = [(a, s) for a in _unwrapped(averaged) for s in _unwrapped(source)]
    short = _shortened(averaged), _shortened(source)
    if short[0] is not None and short[1] is not None:
        views.append((short[0], short[1]))
    a, s = max(views, key=lambda view: len(view[0].keys() & view[1].keys()))
    return {a[view]: s[view] for view in a if view in s}


def _unwrapped(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields views (short name -> name) without the first 0, 1, ... components, all wrappers'."""
    view = {name: name for name in names}
    while True:
        yield view
        first = {short.partition(".")[0] for short in view}
        if len(first) != 1 or not first <= WRAPPERS or any("." not in short for short in view):
            return
        view = {short.partition(".")[2]: name for short, name in view.items()}


def _shortened(names: Iterable[str]) -> dict[str, str] | None:
    """The view without wrappers' components; None if two names become equal."""
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
    unloaded = (
        "The model's adapters were merged and unloaded (merge_and_unload(), unload()), or this is "
        "the model without them: merge a copy of it instead, after averaged.copy_to(copy). "
        if any(_is_below_an_adapter(name) for name in missing)
        and not any(map(_is_below_an_adapter, source))
        else ""
    )
    return (
        f"the model doesn't match its average by name: missing from the model: {_list(missing)}; "
        f"unexpected in the model: {_list(unexpected)}. {told_apart}{unloaded}"
        f"Pass the model that was averaged (wrapped or not); if it has gained or lost layers, "
        f"parameters or buffers since, averaged.adopt(model) takes that over"
    )


def _is_below_an_adapter(name: str) -> bool:
    """Whether it is a tensor of a layer that PEFT has put an adapter on."""
    return "base_layer" in name.split(".")


def _list(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
