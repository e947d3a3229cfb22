"""The short paths of modules that users import: ``ema_fused.schedules`` and the like.

Each is a name for a module in one of the folders, and is that module itself: ``ema_fused.schedules
is ema_fused.averages.schedules``. To add one, add a line to the table.
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
    """Finds the modules of the table under their short paths, when these are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "ema_fused" or name not in PUBLIC_MODULES:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        # A module that puts another into its place is replaced by it in the import as well.
        _, _, name = module.__name__.partition(".")
        sys.modules[module.__name__] = importlib.import_module(f"ema_fused.{PUBLIC_MODULES[name]}")


def install() -> None:
    """Makes the short paths importable."""
    sys.meta_path.append(_ShortPaths())
