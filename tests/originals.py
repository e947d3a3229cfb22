"""The originals that have no place in the environment: loaded from where `make` unpacked them.

mmdet, MMPretrain and MMSelfSup need compiled operators and much else, two of them are tested in two
versions, and all that counts here is a few files of each. So a package stands in bare, without its
``__init__``, and only the files that are asked for, and what they import of the package, are run.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

_UNPACKED = Path(sys.prefix) / "unpacked"
_imported: dict[str, dict[str, types.ModuleType]] = {}


def original(pin: str, module: str) -> Any:
    """The module of an unpacked package, say ``original("mmdet==3.3.0", "mmdet.models.x")``.

    It is imported once, and not left in ``sys.modules``: two versions of a package can be at hand.
    """
    folder = _UNPACKED / pin
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} isn't there: `make test` unpacks {pin} into it")
    package = module.partition(".")[0]
    others = _take_out(package)
    sys.modules.update(_imported.get(pin, {}))
    try:
        *parents, _ = module.split(".")
        for depth in range(1, len(parents) + 1):
            name = ".".join(parents[:depth])
            if name not in sys.modules:
                bare = types.ModuleType(name)
                bare.__path__ = [str(folder.joinpath(*parents[:depth]))]
                sys.modules[name] = bare
        return importlib.import_module(module)
    finally:
        _imported[pin] = _take_out(package)
        sys.modules.update(others)


def _take_out(package: str) -> dict[str, types.ModuleType]:
    """Removes a package and its modules from those that are imported."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def stand_in_for_torchvision() -> None:
    """mmcv 1.x looks for torchvision's list of pretrained models when it is imported; none here.

    The releases of torchvision that go with this torch need a GPU build of it.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    torchvision = types.ModuleType("torchvision")
    torchvision.__version__ = "0.0.0"  # type: ignore[attr-defined]
    torchvision.models = types.ModuleType("torchvision.models")  # type: ignore[attr-defined]
    sys.modules["torchvision"] = torchvision
    sys.modules["torchvision.models"] = torchvision.models  # type: ignore[attr-defined]
