"""mmengine's pure-Python configs, which name classes by imports, not by strings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import ROOT, processes
from tests.frameworks.hooks.mmengine_runs import differences, load

CONFIG = """
{imports}
from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper
from torch.optim import SGD
from tests.frameworks.hooks.mmengine_runs import Images, Net

custom_hooks = [dict(type=EMAHook, momentum=0.07{more})]
model = dict(type=Net)
train_dataloader = dict(
    dataset=dict(type=Images),
    batch_size=8,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type="default_collate"),
)
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
randomness = dict(seed=3)
log_level = "ERROR"
work_dir = {folder!r}
"""

RUN = """
import sys
from mmengine.config import Config
from mmengine.hooks import EMAHook as Theirs
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
import ema_fused.hooks.mmengine as ours
from tests.frameworks.hooks.mmengine_runs import Images, Net
if "replace" in sys.argv:
    ours.register(replace=True)
config = Config.fromfile(sys.argv[1])
assert config._imported_names  # mmengine has taken it for a lazy one
runner = Runner.from_cfg(config)
runner.train()
(hook,) = (hook for hook in runner.hooks if isinstance(hook, Theirs))
print(type(hook).__module__, type(hook.ema_model).__module__)
"""

THEIRS = "from mmengine.hooks import EMAHook"
OURS = "from ema_fused.hooks.mmengine import EMAHook"
AVERAGE = "from mmengine.model import ExponentialMovingAverage"


@pytest.mark.slow
def test_the_import_changes_and_no_other_line(tmp_path: Path) -> None:
    cases = {
        "theirs": (THEIRS, "", [], "mmengine.hooks.ema_hook mmengine.model.averaged_model"),
        # A registry isn't asked for the hook; for the average it is, by its name.
        "replaced": (THEIRS, "", ["replace"], "mmengine.hooks.ema_hook ema_fused.averages.kinds"),
        "ours": (OURS, "", [], "ema_fused.hooks.mmengine ema_fused.averages.kinds"),
        "average": (
            f"{OURS}\n{AVERAGE}",
            ", ema_type=ExponentialMovingAverage",
            [],
            "ema_fused.hooks.mmengine ema_fused.averages.kinds",
        ),
    }
    for name, (imports, more, arguments, expected) in cases.items():
        folder = tmp_path / name
        file = tmp_path / f"{name}.py"
        file.write_text(CONFIG.format(imports=imports, more=more, folder=str(folder)))
        printed = processes.run_fork("mmengine.runner", "-c", RUN, file, *arguments).stdout
        assert printed.strip().splitlines()[-1] == expected
    found = {name: load(tmp_path / name / "epoch_2.pth") for name in cases}
    for name in cases:
        for state in ("state_dict", "ema_state_dict"):
            assert differences(found[name][state], found["theirs"][state]) == []
    head = found["ours"]["state_dict"]["head.weight"]
    assert not torch.equal(head, found["ours"]["ema_state_dict"]["module.head.weight"])


def test_the_documentation_says_so() -> None:
    page = (ROOT / "docs" / "already_using.md").read_text(encoding="utf-8")
    assert f"{OURS}  # was: {THEIRS}\n" in page
