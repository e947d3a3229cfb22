"""By which names mmengine finds our hook and averages, and what importing them imports."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.hooks import EMAHook
from mmengine.model import averaged_model as theirs
from mmengine.registry import HOOKS, MODELS

import ema_fused
from ema_fused.hooks import mmengine as ours
from tests import processes
from tests.frameworks.hooks.ema_hooks import KINDS, OURS, QUIET, THEIRS
from tests.frameworks.hooks.mmengine_runs import differences, load, trained

pytestmark = QUIET

AVERAGES = ["StochasticWeightAverage", "ExponentialMovingAverage", "MomentumAnnealingEMA"]
# Whether these are installed or not.
FRAMEWORKS = ["mmengine", "mmcv", "mmdet", "mmpretrain", "mmselfsup", "mmcls", "torchvision"]
FRAMEWORKS += ["lightning", "pytorch_lightning", "timm", "diffusers", "accelerate", "transformers"]
IMPORTED = f"""
import sys
def imported():
    return [name for name in {FRAMEWORKS} if sys.modules.get(name) is not None]
"""


def test_both_hooks_have_names_of_their_own() -> None:
    assert HOOKS.get("EMAHook") is EMAHook
    assert HOOKS.get("FusedEMAHook") is ours.EMAHook
    assert HOOKS.get("FusedMomentumUpdateHook") is ours.MomentumUpdateHook
    assert HOOKS.get("FusedBYOLHook") is ours.BYOLHook


@pytest.mark.parametrize("name", AVERAGES)
def test_both_averages_have_names_of_their_own(name: str) -> None:
    assert MODELS.get(name) is getattr(theirs, name)
    assert MODELS.get(f"Fused{name}") is getattr(ema_fused, name)
    assert getattr(ours, name) is getattr(ema_fused, name)


def test_averages_of_other_packages_are_registered_too() -> None:
    assert MODELS.get("FusedExpMomentumEMA") is ema_fused.ExpMomentumEMA
    assert issubclass(MODELS.get("FusedCosineEMA"), ema_fused.CosineEMA)
    assert MODELS.get("FusedInvertedCosineEMA") is ours.InvertedCosineEMA


def test_both_hooks_run_in_one_process_by_their_names(tmp_path: Path) -> None:
    runs = [
        trained({"type": name, **KINDS["ema"]}, tmp_path / name)
        for name in ("EMAHook", "FusedEMAHook", OURS)
    ]
    assert [type(run.hook()) for run in runs] == [EMAHook, ours.EMAHook, ours.EMAHook]
    for run in runs[1:]:
        assert differences(runs[0].everything(), run.everything()) == []


@pytest.mark.parametrize(
    "name", ["FusedExponentialMovingAverage", "ema_fused.averages.ExponentialMovingAverage"]
)
def test_our_averages_are_found_by_their_own_names(name: str, tmp_path: Path) -> None:
    hook = {"type": OURS, "momentum": 0.07}
    run = trained({**hook, "ema_type": name}, tmp_path / "named", epochs=1)
    assert type(run.hook().ema_model) is ema_fused.ExponentialMovingAverage
    assert differences(trained(hook, tmp_path / "default", epochs=1).metrics, run.metrics) == []


def test_importing_the_hook_imports_mmengine_alone() -> None:
    code = f"""{IMPORTED}
import ema_fused
assert imported() == [], imported()
import ema_fused.hooks
assert imported() == [], imported()
import mmengine.runner
by_itself = imported()
import ema_fused.hooks.mmengine
assert imported() == by_itself, imported()
assert by_itself == ["mmengine"], by_itself
"""
    processes.run("-c", code)


def test_a_config_finds_the_hook_without_an_import(tmp_path: Path) -> None:
    """And the averages of packages that aren't installed, by the names that they have there."""
    code = f"""
import sys
from pathlib import Path
from mmengine.registry import HOOKS
from tests.frameworks.hooks.mmengine_runs import trained
assert "ema_fused.hooks" not in sys.modules
folder = Path(sys.argv[1])
hook = {{"type": {OURS!r}, "momentum": 0.07}}
assert type(trained(hook, folder).hook()).__module__ == "ema_fused.hooks.mmengine"
for name in ("ExpMomentumEMA", "mmdet.ExpMomentumEMA", "CosineEMA", "mmpretrain.CosineEMA",
             "mmselfsup.CosineEMA"):
    more = {{"momentum": 0.996}} if "selfsup" in name else {{}}
    run = trained({{**hook, "ema_type": name, **more}}, folder / name, epochs=1)
    print(name, type(run.hook().ema_model).__name__)
"""
    printed = processes.run("-c", code, tmp_path).stdout.splitlines()
    for line in (
        "ExpMomentumEMA ExpMomentumEMA",
        "mmdet.ExpMomentumEMA ExpMomentumEMA",
        "CosineEMA CosineEMA",
        "mmpretrain.CosineEMA CosineEMA",
        "mmselfsup.CosineEMA InvertedCosineEMA",
    ):
        assert line in printed
    their_run = trained({"type": THEIRS, "momentum": 0.07}, tmp_path / "theirs")
    found, expected = (load(folder / "epoch_3.pth") for folder in (tmp_path, their_run.folder))
    for state in ("state_dict", "ema_state_dict"):
        assert differences(found[state], expected[state]) == []


def test_an_unchanged_config_runs_ours_once_it_is_registered_in_the_originals_place(
    tmp_path: Path,
) -> None:
    code = """
import sys
from pathlib import Path
import ema_fused.hooks.mmengine as ours
from mmengine.model import ExponentialMovingAverage as Theirs
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS, MODELS
assert HOOKS.get("EMAHook") is EMAHook and MODELS.get("ExponentialMovingAverage") is Theirs
ours.register(replace=True)
from tests.frameworks.hooks.mmengine_runs import Net, trained
run = trained({"type": "EMAHook", "momentum": 0.07}, Path(sys.argv[1]))
assert type(run.hook()) is ours.EMAHook
built = MODELS.build({"type": "ExponentialMovingAverage", "model": Net(), "momentum": 0.07})
assert type(built) is ours.ExponentialMovingAverage is type(run.hook().ema_model)
for name in ("StochasticWeightAverage", "MomentumAnnealingEMA"):
    assert MODELS.get(name) is getattr(ours, name)
assert HOOKS.get("FusedEMAHook") is ours.EMAHook
ours.register(replace=True)  # nothing changes if it is done again
"""
    processes.run_fork("mmengine.runner", "-c", code, tmp_path / "new")
    run = trained({"type": THEIRS, "momentum": 0.07}, tmp_path / "here")
    assert type(run.hook()) is EMAHook
    for name in ("epoch_1.pth", "epoch_3.pth"):
        found, expected = load(tmp_path / "new" / name), run.checkpoint(name)
        for state in ("state_dict", "ema_state_dict"):
            assert differences(found[state], expected[state]) == []


def test_without_mmengine_the_import_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["mmengine"] = None  # as if it weren't installed
import ema_fused, ema_fused.hooks
try:
    import ema_fused.hooks.mmengine
except ImportError as error:
    print(error)
"""
    printed = processes.run("-c", code).stdout
    assert "pip install 'ema_fused[mmengine]'" in printed
    assert printed.startswith("mmengine can't be imported")
