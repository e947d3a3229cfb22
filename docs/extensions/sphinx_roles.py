"""Docstrings as the pages show them: Sphinx roles become links, ``::`` an ordinary colon.

Roles read well in an editor and in ``help()``, so the sources keep them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Extension, Object

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`(~?)([\w.]+)`")
_BLOCK = re.compile(r"::$", re.MULTILINE)


class SphinxRoles(Extension):
    """Called by mkdocstrings for every object that it has read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites its docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(lambda found: _link(obj, found[1], found[2]), obj.docstring.value)
            obj.docstring.value = _BLOCK.sub(":", text)


def _link(obj: Object, tilde: str, target: str) -> str:
    """A link where the name has a place in the pages; else the name alone."""
    shown = target.rpartition(".")[2] if tilde else target
    return f'<autoref identifier="{_full_path(obj, target)}" optional>`{shown}`</autoref>'


def _full_path(obj: Object, target: str) -> str:
    """Of a name as it is meant where it stands: in the class, else in the module, else anywhere."""
    if target.startswith("ema_fused."):
        return target
    first, dot, rest = target.partition(".")
    place: Object | None = obj
    while place is not None:
        found = place.all_members.get(first)
        if found is not None:
            path = found.target_path if isinstance(found, Alias) else found.path
            return path + dot + rest
        place = place.parent
    return target
