"""The short paths of modules that users import: ``ema_fused.schedules`` and the like.

Each is an alias of a module in one of the folders, the same module object: ``ema_fused.schedules is
ema_fused.averages.schedules``. To add one, add a line to ``PUBLIC_MODULES``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PUBLIC_MODULES = {
    "checkpoints": "saving.checkpoints",
    "export": "saving.export",
    "power_profiles": "posthoc.power_profiles",
    "reconstruction": "posthoc.reconstruction",
    "reference": "engine.reference",
    "schedules": "averages.schedules",
    "telemetry": "averages.telemetry",
}


class _ShortPaths(MetaPathFinder, Loader):
    """Imports the modules of ``PUBLIC_MODULES`` by their short paths."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "ema_fused" or name not in PUBLIC_MODULES:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        # The import statement returns what sys.modules holds now, so it returns the real module.
        _, _, name = module.__name__.partition(".")
        sys.modules[module.__name__] = importlib.import_module(f"ema_fused.{PUBLIC_MODULES[name]}")


def install() -> None:
    """Makes the short paths importable."""
    sys.meta_path.append(_ShortPaths())
