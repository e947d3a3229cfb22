"""The originals that have no place in the environment: loaded from where `make` unpacked them.

mmdet, MMPretrain and MMSelfSup need compiled operators and much else, two of them are tested in two
versions, and all that counts here is a few files of each. So a package stands in bare, without its
``__init__``, and only the files that are asked for, and what they import of the package, are run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_UNPACKED = Path(sys.prefix) / "unpacked"
_imported: dict[str, dict[str, types.ModuleType]] = {}


def folder_of(pin: str) -> Path:
    """Where a package is unpacked.

    Raises:
        FileNotFoundError: it isn't.
    """
    folder = _UNPACKED / pin
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} isn't there: `make test` unpacks {pin} into it")
    return folder


def original(
    pin: str, module: str, *, stand_ins: Mapping[str, Mapping[str, object]] | None = None
) -> Any:
    """The module of an unpacked package, say ``original("mmdet==3.3.0", "mmdet.models.x")``.

    It is imported once and removed from ``sys.modules``, so that two versions can be used.

    Args:
        stand_ins: modules of the package to stand in for those it has, by what they have.
    """
    folder = folder_of(pin)
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
        for name, names in (stand_ins or {}).items():
            vars(sys.modules.setdefault(name, types.ModuleType(name))).update(names)
        with _tables_stand_in() if package == "trl" else _torchvision_stands_in():
            return importlib.import_module(module)
    finally:
        _imported[pin] = _take_out(package)
        sys.modules.update(others)


def _take_out(package: str) -> dict[str, types.ModuleType]:
    """Removes a package and its modules from those that are imported."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


class _Normalize:
    """A stand-in for torchvision's class, which MMSelfSup's CAE makes and no test uses."""

    def __init__(self, mean: object, std: object) -> None:
        pass


@contextlib.contextmanager
def _torchvision_stands_in() -> Iterator[None]:
    """mmcv 1.x and MMSelfSup import names of torchvision that no test needs.

    The releases of torchvision for this torch need a GPU build of it. The stand-in is removed
    afterwards: other libraries would take it for the real one.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    modules = {
        name: types.ModuleType(name)
        for name in ("torchvision", "torchvision.models", "torchvision.transforms")
    }
    torchvision: Any = modules["torchvision"]
    torchvision.__version__ = "0.0.0"
    torchvision.models = modules["torchvision.models"]
    torchvision.transforms = modules["torchvision.transforms"]
    torchvision.transforms.Normalize = _Normalize
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class _Absent(types.ModuleType):
    """A stand-in that has every name, as a class: for annotations and isinstance()."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def _tables_stand_in() -> Iterator[None]:
    """TRL's modules import packages for tables, 250 MB of them, which its callbacks don't use."""
    importlib.import_module("transformers.trainer")  # has looked for them itself by now
    names = ("pandas", "datasets", "pyarrow", "pyarrow.compute", "pyarrow.types")
    absent = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in absent:
        sys.modules[name] = _Absent(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def import_mmcv() -> None:
    """Imports mmcv 1.x, which looks for torchvision's list of pretrained models."""
    with _torchvision_stands_in(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmcv 1.x says that there is an mmcv 2
        importlib.import_module("mmcv.runner")
