"""The layers of the project, as its imports and includes show them."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT

PACKAGE = ROOT / "ema_fused"

# What stands beside the folders: what it may import. Of a folder its own ``__init__`` says so.
BESIDE = {
    "__main__": {"cli"},
    "cli": {"bench", "converting", "ema_fused", "engine", "merging", "posthoc"},
    "ema_fused": {"averages", "engine", "posthoc", "public_modules"},
    "frameworks": set[str](),
    "public_modules": set[str](),
}
# Says what to install for a framework that is missing; every folder may ask it.
FOR_ALL = {"frameworks"}

# The modules that import each of these at their top, and so are imported only where it is there.
# Everything else finds them inside the function that needs them, or not at all.
HOMES = {
    "accelerate": ("callbacks.accelerate",),
    "deepspeed": (),
    "diffusers": ("adapters.diffusers",),
    "ema_pytorch": ("adapters.ema_pytorch",),
    "lightning": (),  # two packages have it: callbacks.lightning finds the one that is in use
    "matplotlib": ("bench",),
    "mmcv": ("hooks.on_mmcv",),
    "mmengine": ("hooks.on_mmengine",),
    "numpy": ("engine.reference", "bench"),
    "peft": ("adapters.peft",),
    "pytorch_lightning": (),
    "rich": ("bench",),
    "safetensors": ("callbacks.huggingface_files",),
    "sklearn": (),
    "timm": ("adapters.timm",),
    "torch_ema": ("adapters.torch_ema",),
    "torchtitan": ("adapters.torchtitan",),
    "tqdm": (),
    "transformers": (
        "callbacks.huggingface",
        "callbacks.huggingface_files",
        "callbacks.trl",
        "callbacks.trl_bema",
    ),
    "ultralytics": ("adapters.ultralytics",),
}


class Import(NamedTuple):
    """``name`` is a module, or what a module has, with the module's path before it."""

    importer: str  # without ``ema_fused.`` before it, as all of our modules here
    name: str
    at_the_top: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "ema_fused"


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, functions)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, id(node) not in later)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; the others are absolute"
            for alias in node.names:
                yield Import(module, f"{node.module}.{alias.name}", id(node) not in later)


IMPORTS = [found for module in MODULES for found in imports_of(module)]


def ours(name: str) -> str | None:
    """The module of ours that an imported name is, or comes from."""
    package, _, inside = name.partition(".")
    if package != "ema_fused":
        return None
    while inside and inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or "ema_fused"


def is_in(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def folder_of(module: str) -> str:
    """The folder of a module; of one that stands beside the folders its own name."""
    return module.partition(".")[0]


FOLDERS = sorted({folder_of(module) for module in MODULES} - BESIDE.keys())


def may_import(folder: str) -> set[str]:
    """What a folder's ``__init__`` says that it may import, after "May import"."""
    if folder in BESIDE:
        return BESIDE[folder]
    purpose = ast.get_docstring(ast.parse(MODULES[folder].read_text())) or ""
    allowed = re.search(r"May\s+import\s+(.*?)[.;](?:\s|$)", purpose, re.DOTALL)
    assert allowed is not None, f"ema_fused/{folder}/__init__.py doesn't say what it may import"
    return set(re.findall(r"``(\w+)``", allowed[1]))


def test_folders_say_what_they_may_import() -> None:
    assert len(FOLDERS) == 12
    for folder in FOLDERS:
        assert may_import(folder) <= {"ema_fused", *FOLDERS}, folder


@pytest.mark.parametrize("folder", [*FOLDERS, *BESIDE])
def test_a_folder_imports_only_what_it_says(folder: str) -> None:
    allowed = {folder} | may_import(folder) | FOR_ALL
    others = [
        f"{importer} imports {name}"
        for importer, name, _ in IMPORTS
        if folder_of(importer) == folder
        and (imported := ours(name)) is not None
        and folder_of(imported) not in allowed
    ]
    assert others == []


def in_a_circle(below: dict[str, set[str]]) -> list[str]:
    """Those that import one another, through others too; ``below``: what each of them imports."""
    while lowest := {name for name, imported in below.items() if not imported}:
        below = {name: got - lowest for name, got in below.items() if name not in lowest}
    return sorted(below)


def test_no_folders_may_import_one_another_in_a_circle() -> None:
    assert in_a_circle({folder: may_import(folder) for folder in [*FOLDERS, *BESIDE]}) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    below = {module: set[str]() for module in MODULES}
    for importer, name, _ in IMPORTS:
        imported = ours(name)
        if imported is not None:
            below[importer].add(imported)
    assert in_a_circle(below) == []


def test_hooks_callbacks_and_adapters_share_nothing_private() -> None:
    """What two of them need has its place in a lower layer."""
    packages = {"adapters", "callbacks", "hooks"}
    across = [
        f"{importer} imports {name}"
        for importer, name, _ in IMPORTS
        if (imported := ours(name)) is not None
        and {importer.partition(".")[0], imported.partition(".")[0]} <= packages
        and importer.partition(".")[0] != imported.partition(".")[0]
    ]
    # Lightning's averages are torch's AveragedModel, and so the adapter of that; TRL's teacher is
    # an adapter of PEFT.
    assert sorted(across) == [
        "callbacks.lightning imports ema_fused.adapters.swa_utils.AveragedModel",
        "callbacks.trl imports ema_fused.adapters.peft.add_averaged_adapter",
    ]


def test_no_module_imports_a_private_name_of_another() -> None:
    private = [
        f"{importer} imports {name}"
        for importer, name, _ in IMPORTS
        if ours(name) is not None and re.search(r"\._(?!_)", name)
    ]
    assert private == []


def test_each_framework_is_imported_by_its_own_module_alone() -> None:
    at_the_top = [found for found in IMPORTS if found.at_the_top]
    elsewhere = []
    for importer, name, _ in at_the_top:
        package = name.partition(".")[0]
        if package in sys.stdlib_module_names or package in ("ema_fused", "torch"):
            continue
        if not is_in(importer, HOMES.get(package, ())):
            elsewhere.append(f"{importer} imports {name}")
    assert elsewhere == []
    for package, homes in HOMES.items():
        for home in homes:
            if home in MODULES and home != "bench":
                assert any(
                    found.importer == home and found.name.partition(".")[0] == package
                    for found in at_the_top
                ), f"{home} no longer imports {package}"


# ---- The compiled core ---------------------------------------------------------------------------

_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
_TORCHS = ("ATen/", "c10/", "torch/")
_PYTHONS = ("Python.h", "pybind11/")


def includes(source: str) -> set[str]:
    """All that a file of csrc includes, through files of ours too."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        for name in _INCLUDE.findall((ROOT / "csrc" / waiting.pop()).read_text()):
            if name not in found:
                found.add(name)
                if (ROOT / "csrc" / name).is_file():
                    waiting.append(name)
    return found


def sources_of_the_core() -> list[str]:
    """What CMakeLists.txt builds without Python."""
    text = (ROOT / "CMakeLists.txt").read_text()
    core = text[text.index("# ---- The core") : text.index("# ---- The Python extension")]
    return sorted(set(re.findall(r"csrc/(\w+\.(?:cpp|cu))", core)))


def test_the_core_is_what_it_is_said_to_be() -> None:
    assert {"chunk_table.cpp", "update_cpu_entry.cpp", "update_cuda_kernel.cu"} <= set(
        sources_of_the_core()
    )


@pytest.mark.parametrize("source", sources_of_the_core())
def test_kernels_include_neither_torch_nor_python(source: str) -> None:
    found = includes(source)
    assert any((ROOT / "csrc" / name).is_file() for name in found)
    assert [name for name in found if name.startswith(_TORCHS + _PYTHONS)] == []


def test_nothing_is_built_with_torch_s_headers() -> None:
    files = [path for path in (ROOT / "csrc").glob("*.*") if path.suffix != ".in"]
    assert len(files) > 20
    for path in files:
        assert not [name for name in includes(path.name) if name.startswith(_TORCHS)], path.name
