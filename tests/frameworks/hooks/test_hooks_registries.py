"""What configurations get by a name: ours beside the originals, and in their place when asked for.

The frameworks are laid out as they are installed: their own ``registry.py`` and the files of the
originals, in packages that hold nothing else. Each test runs in processes of their own, since a
registry exists once in a process.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.frameworks.originals import original

# By package: the release, and the original that a location of its registries imports.
PACKAGES = {
    "mmdet": ("mmdet==3.3.0", {"engine.hooks": "mean_teacher_hook", "models": "layers.ema"}),
    "mmpretrain": ("mmpretrain==1.2.0", {"engine": "hooks.ema_hook", "models": "utils.ema"}),
    "mmselfsup": ("mmselfsup==1.0.0", {"models": "utils.ema"}),
}

# What a process says it has found: the module and the name of each class.
START = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))

def told(cls):
    return None if cls is None else f"{cls.__module__}.{cls.__name__}"

def imported(package):
    return any(name.partition(".")[0] == package for name in sys.modules)
"""

RUN = """
from tests.frameworks.hooks import mmengine_runs as runs
import torch

class Net(runs.Net):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = runs.Net(), runs.Net()

def hook_of(number, config, scope, **arguments):
    run = runs.build(config, folder / f"run{number}", model=Net, default_scope=scope, **arguments)
    run.train()
    (hook,) = [h for h in run.runner.hooks if type(h).__name__ == config["type"].split(".")[-1]]
    return hook
"""


def install(folder: Path, package: str) -> None:
    """Lays a package out as a user has it, with empty packages for what isn't looked at."""
    pin, files = PACKAGES[package]
    registry = Path(original(pin, f"{package}.registry").__file__)
    locations = set(re.findall(rf"'{package}\.([\w.]+)'", registry.read_text()))
    assert set(files) <= locations
    modules = [f"{location}.{file}" for location, file in files.items()]
    for name in [*locations, *(module.rpartition(".")[0] for module in modules)]:
        path = folder / package
        for part in ["", *name.split(".")]:
            path /= part
            path.mkdir(exist_ok=True, parents=True)
            (path / "__init__.py").touch()
    shutil.copy(registry, folder / package)
    for (location, file), module in zip(files.items(), modules, strict=True):
        source = Path(original(pin, f"{package}.{module}").__file__)
        target = folder.joinpath(package, *module.split(".")).with_suffix(".py")
        shutil.copy(source, target)
        inner = folder.joinpath(package, *location.split("."), "__init__.py")
        inner.write_text(f"from .{file} import *\n")


def found_by(code: str, folder: Path) -> Any:
    """What the code has put into ``found``."""
    output = processes.run("-c", f"{START}{code}\nprint(json.dumps(found))", folder).stdout
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the packages."""
    folder = tmp_path_factory.mktemp("installed")
    for package in PACKAGES:
        install(folder, package)
    return folder


FUSED = {
    "FusedMeanTeacherHook": "ema_fused.hooks.mmdet.MeanTeacherHook",
    "FusedMMPretrainEMAHook": "ema_fused.hooks.mmpretrain.EMAHook",
    "FusedMomentumUpdateHook": "ema_fused.hooks.mmengine.MomentumUpdateHook",
    "FusedBYOLHook": "ema_fused.hooks.mmengine.MomentumUpdateHook",
    "FusedCosineEMA": "ema_fused.hooks.mmengine_averages.CosineEMA",
    "FusedInvertedCosineEMA": "ema_fused.hooks.mmengine_averages.InvertedCosineEMA",
    "FusedExpMomentumEMA": "ema_fused.averages.kinds.ExpMomentumEMA",
}


def test_importing_registers_ours_beside_the_originals_and_imports_no_framework_but_mmengine(
    installed: Path,
) -> None:
    code = """
import ema_fused.hooks.mmdet, ema_fused.hooks.mmpretrain
found = {"imported": [name for name in ("mmdet", "mmpretrain", "mmcv") if imported(name)]}
from mmengine.registry import HOOKS, MODELS
names = {**HOOKS.module_dict, **MODELS.module_dict}
found["fused"] = {name: told(cls) for name, cls in names.items() if name.startswith("Fused")}
found["EMAHook"] = told(HOOKS.get("EMAHook"))
found["others"] = [
    told(registry.get(name))
    for registry, name in (
        (HOOKS, "mmdet.MeanTeacherHook"), (HOOKS, "mmpretrain.EMAHook"),
        (MODELS, "mmdet.ExpMomentumEMA"), (MODELS, "mmpretrain.CosineEMA"),
    )
]
# A name of mmengine's is found from within each framework.
import mmdet.registry
found["from within"] = told(mmdet.registry.HOOKS.get("FusedMeanTeacherHook"))
"""
    found = found_by(code, installed)
    assert found["imported"] == []
    assert FUSED.items() <= found["fused"].items()
    assert found["EMAHook"] == "mmengine.hooks.ema_hook.EMAHook"
    assert found["others"] == [
        "mmdet.engine.hooks.mean_teacher_hook.MeanTeacherHook",
        "mmpretrain.engine.hooks.ema_hook.EMAHook",
        "mmdet.models.layers.ema.ExpMomentumEMA",
        "mmpretrain.models.utils.ema.CosineEMA",
    ]
    assert found["from within"] == FUSED["FusedMeanTeacherHook"]


UNCHANGED = """
def unchanged(first):
    mean_teacher = {"type": "MeanTeacherHook", "momentum": 0.05}
    cosine = {"type": "EMAHook", "ema_type": "CosineEMA", "evaluate_on_origin": True}
    exp = {"type": "EMAHook", "ema_type": "ExpMomentumEMA"}
    teacher = hook_of(first, mean_teacher, "mmdet", epochs=1)
    with_origin = hook_of(first + 1, cosine, "mmpretrain", epochs=1)
    from_mmengine = hook_of(first + 2, exp, "mmdet", epochs=1)
    return [
        told(type(part))
        for part in (
            teacher, with_origin, with_origin.ema_model, from_mmengine, from_mmengine.ema_model
        )
    ]
"""
THEIRS = [
    "mmdet.engine.hooks.mean_teacher_hook.MeanTeacherHook",
    "mmpretrain.engine.hooks.ema_hook.EMAHook",
    "mmpretrain.models.utils.ema.CosineEMA",
    "mmengine.hooks.ema_hook.EMAHook",
    "mmdet.models.layers.ema.ExpMomentumEMA",
]
OURS = [
    "ema_fused.hooks.mmdet.MeanTeacherHook",
    "ema_fused.hooks.mmpretrain.EMAHook",
    "ema_fused.hooks.mmengine_averages.CosineEMA",
    "ema_fused.hooks.mmengine.EMAHook",
    "ema_fused.averages.kinds.ExpMomentumEMA",
]
REPLACE = """
import ema_fused.hooks.mmdet, ema_fused.hooks.mmpretrain, ema_fused.hooks.mmengine
for module in (ema_fused.hooks.mmdet, ema_fused.hooks.mmpretrain, ema_fused.hooks.mmengine):
    module.register(replace=True)
"""


def test_an_unchanged_configuration_runs_ours_where_that_is_asked_for_first(
    installed: Path, tmp_path: Path
) -> None:
    """The registries import the originals when they are first used: ours come after them."""
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    code = f"""{RUN}{UNCHANGED}{REPLACE}
found = {{"unchanged": unchanged(0)}}
# Importing the originals now is too late to undo it.
import mmdet.engine.hooks, mmpretrain.engine, mmdet.models, mmpretrain.models
from mmdet.registry import HOOKS
from mmengine.registry import HOOKS as ROOT
found["again"] = told(HOOKS.get("MeanTeacherHook"))
found["original"] = told(mmdet.engine.hooks.MeanTeacherHook)
found["root"] = ROOT.module_dict.get("MeanTeacherHook")
"""
    found = found_by(code, tmp_path)
    assert found == {
        "unchanged": OURS,
        "again": OURS[0],
        "original": THEIRS[0],
        "root": None,
    }


def test_an_unchanged_configuration_runs_the_originals_until_ours_are_asked_for(
    installed: Path, tmp_path: Path
) -> None:
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    code = f"""{RUN}{UNCHANGED}
import ema_fused.hooks.mmdet, ema_fused.hooks.mmpretrain
import mmselfsup.registry
found = {{"before": unchanged(0)}}
{REPLACE}
found["after"] = unchanged(3)
found["selfsup"] = told(mmselfsup.registry.MODELS.get("CosineEMA"))
found["pretrain"] = told(mmselfsup.registry.MODELS.get("mmpretrain.CosineEMA"))
"""
    found = found_by(code, tmp_path)
    assert found["before"] == THEIRS
    assert found["after"] == OURS
    # One name, two conventions.
    assert found["selfsup"] == FUSED["FusedInvertedCosineEMA"]
    assert found["pretrain"] == FUSED["FusedCosineEMA"]


def test_without_the_frameworks_the_names_are_put_into_mmengine_s_registries(
    tmp_path: Path,
) -> None:
    """Packages that have no registry, as older releases, or whose own imports fail, beside them."""
    old = tmp_path / "mmpretrain"
    old.mkdir()
    (old / "__init__.py").touch()
    code = f"""{RUN}
from mmengine.registry import HOOKS, MODELS
import shutil
import ema_fused.hooks.mmdet as mmdet, ema_fused.hooks.mmpretrain as mmpretrain

(folder / "mmdet").mkdir()
(folder / "mmdet" / "__init__.py").write_text("import something_that_is_not_there")
try:
    mmdet.register(replace=True)
except ModuleNotFoundError as error:
    found = {{"broken": error.name, "untouched": HOOKS.module_dict.get("MeanTeacherHook")}}
shutil.rmtree(folder / "mmdet")
sys.path_importer_cache.clear()

for module in (mmdet, mmpretrain):
    module.register(replace=True)
found["models"] = [told(MODELS.get(name)) for name in ("ExpMomentumEMA", "CosineEMA")]
found["hooks"] = [
    told(type(hook_of(number, {{"type": name}}, "mmengine", epochs=1)))
    for number, name in enumerate(("MeanTeacherHook", "EMAHook"))
]
"""
    found = found_by(code, tmp_path)
    assert found["broken"] == "something_that_is_not_there"
    assert found["untouched"] is None
    assert found["hooks"] == OURS[:2]
    assert found["models"] == [OURS[4], OURS[2]]


def test_without_mmengine_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = """
import importlib
sys.modules["mmengine"] = None  # as if it weren't installed
found = {}
for name in ("mmdet", "mmpretrain", "mmengine"):
    try:
        importlib.import_module(f"ema_fused.hooks.{name}")
    except ImportError as error:
        found[name] = str(error)
"""
    found = found_by(code, tmp_path)
    assert set(found) == {"mmdet", "mmpretrain", "mmengine"}
    for message in found.values():
        assert message.startswith("mmengine can't be imported (")
        assert "pip install 'ema_fused[mmengine]'" in message
