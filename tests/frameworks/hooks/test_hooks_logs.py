"""What a run has in its log: the originals' words, in the file where its user looks for them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS

import ema_fused
from ema_fused.engine import notices
from ema_fused.hooks import mmengine as ours
from ema_fused.hooks import mmpretrain
from tests.frameworks.hooks import mmcv_runs
from tests.frameworks.hooks.ema_hooks import KINDS, OURS, QUIET, THEIRS
from tests.frameworks.hooks.mmengine_runs import Net, Run, build, trained
from tests.frameworks.originals import original
from tests.networks import Weight

pytestmark = QUIET

PRETRAIN = original("mmpretrain==1.2.0", "mmpretrain.engine.hooks.ema_hook").EMAHook
LARGE = r"The value of momentum in EMA is usually a small number"


def log_of(run: Run) -> str:
    """The file that the run has written."""
    (file,) = run.folder.glob("*/*.log")
    return file.read_text(encoding="utf-8")


def silently(do: Callable[[], Any]) -> Any:
    """What it gives; a warning of ours is an error, another isn't asked about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = do()
    assert not [one for one in caught if "ema_fused" in str(one.message) + one.category.__module__]
    assert not [one for one in caught if "momentum" in str(one.message)]
    return result


@pytest.mark.parametrize("side", [THEIRS, OURS], ids=["theirs", "ours"])
def test_a_large_momentum_is_in_the_log_and_no_warning(side: str, tmp_path: Path) -> None:
    hook = {"type": side, "momentum": 0.9}
    run = silently(lambda: trained(hook, tmp_path, epochs=1, log_level="INFO"))
    assert len(re.findall(rf"WARNING - {LARGE}.*momentum,? but got 0\.9", log_of(run))) == 1
    if side == OURS:
        assert "A decay of 0.9 would be momentum=0.1" in log_of(run)


@pytest.mark.parametrize("average", ["ExponentialMovingAverage", "FusedExponentialMovingAverage"])
def test_so_it_is_of_an_average_that_a_model_makes(average: str, tmp_path: Path) -> None:
    """No hook is at work then: ours warns as well, about the line that wants the average."""
    run = build(None, tmp_path, epochs=1, log_level="INFO")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MODELS.build({"type": average, "momentum": 0.9, "model": Weight()})
    assert re.search(rf"WARNING - {LARGE}", log_of(run))
    said = [one for one in caught if re.match(LARGE, str(one.message))]
    assert [one.filename for one in said] == ([__file__] if average.startswith("Fused") else [])


def test_outside_of_a_run_it_is_a_warning_about_the_line_that_asked() -> None:
    for make in (
        lambda: ema_fused.ExponentialMovingAverage(Weight(), 0.9),
        lambda: ema_fused.MomentumAnnealingEMA(Weight(), 0.9),
        lambda: ema_fused.CosineEMA(Weight(), 0.9, max_iters=3),
        lambda: mmcv_runs.OURS.ExpMomentumEMAHook(momentum=0.9),
    ):
        with pytest.warns(UserWarning, match=LARGE) as caught:
            make()
        assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("side", [THEIRS, OURS], ids=["theirs", "ours"])
def test_a_resumed_checkpoint_without_an_average_is_told_in_the_original_s_words(
    side: str, tmp_path: Path
) -> None:
    trained(None, tmp_path / "first", epochs=1)
    run = trained(
        {"type": side, **KINDS["ema"]},
        tmp_path / "second",
        load_from=tmp_path / "first" / "epoch_1.pth",
        resume=True,
        epochs=2,
        log_level="INFO",
    )
    assert re.search(
        r"WARNING - There is no `ema_state_dict` in checkpoint\. `EMAHook` will make a copy of "
        r"`state_dict` as the initial `ema_state_dict`",
        log_of(run),
    )


@pytest.mark.filterwarnings("ignore:Automatically set")
@pytest.mark.parametrize("kind", [PRETRAIN, mmpretrain.EMAHook], ids=["theirs", "ours"])
def test_mmpretrain_s_log_has_the_original_s_words(kind: Any, tmp_path: Path) -> None:
    average = {"type": kind, **KINDS["ema"]}
    both = {**average, "evaluate_on_origin": True}
    trained(average, tmp_path / "first", epochs=1)
    file = tmp_path / "first" / "epoch_1.pth"
    run = build(both, tmp_path / "second", load_from=file, epochs=1, log_level="INFO")
    run.train()
    run.test()
    log = log_of(run)
    assert "Load from a checkpoint with EMA parameters but not resume training" in log
    assert log.index("Start testing on EMA model") < log.index("Start testing on the original mod")


class Halfway(ExponentialMovingAverage):  # type: ignore[misc]
    """Not one of ours."""


def test_an_average_that_is_not_ours_is_told_in_the_log(tmp_path: Path) -> None:
    hook = {"type": OURS, "ema_type": Halfway, "momentum": 0.1}
    run = silently(lambda: trained(hook, tmp_path, epochs=1, log_level="INFO"))
    assert "EMAHook averages by Halfway, which is not one of ema_fused's" in log_of(run)


class Halves(Net):
    """In 16 bits a small momentum is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, images: Any, labels: Any, mode: str = "tensor") -> Any:
        found = super().forward(images, labels, mode)
        return found if mode == "loss" else [one.float() for one in found]


def test_what_the_average_itself_says_in_a_run_is_told_in_the_log(tmp_path: Path) -> None:
    hook = {"type": OURS, "momentum": 0.0002}
    run = silently(lambda: trained(hook, tmp_path, model=Halves, epochs=2, log_level="INFO"))
    assert log_of(run).count("averages are kept in 16 bits and the momentum is 0.0002") == 1


def test_what_is_filtered_is_neither_logged_nor_shown(tmp_path: Path) -> None:
    hook = {"type": OURS, "momentum": 0.9}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", LARGE)
        run = trained(hook, tmp_path / "ignored", epochs=1, log_level="INFO")
        assert not re.search(LARGE, log_of(run))
        warnings.filterwarnings("error", LARGE)
        with pytest.raises(UserWarning, match=LARGE):
            trained(hook, tmp_path / "an error", epochs=1)


class Warns(Hook):  # type: ignore[misc]
    """Another hook, not ours, in whose turn something of ours warns."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 2:
            notices.warn("said beside our hooks")


def test_a_hook_that_raises_lets_go_of_the_log(tmp_path: Path) -> None:
    def fails(step: int) -> float:
        raise ArithmeticError(step)

    made = {
        "type": OURS,
        "ema_type": lambda model: ema_fused.ExponentialMovingAverage(model, fails),
    }
    run = build(made, tmp_path, epochs=1)
    with pytest.raises(ArithmeticError):
        run.train()
    with pytest.warns(UserWarning, match="said later"):
        notices.warn("said later")


def test_what_is_said_beside_a_hook_is_a_warning_and_in_the_log(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="said beside our hooks") as caught:
        run = trained(None, tmp_path, hooks=[{"type": Warns}], epochs=1, log_level="INFO")
    assert [one.filename for one in caught if "said" in str(one.message)] == [__file__]
    assert log_of(run).count("said beside our hooks") == 1


def test_under_mmcv_notices_go_to_the_runner_s_logger(caplog: pytest.LogCaptureFixture) -> None:
    """The runner's, as it has no other; what the constructor says is a warning, as before a run."""
    model = mmcv_runs.net().to(torch.bfloat16)
    hook = mmcv_runs.OURS.EMAHook(0.1)
    name = "torch's foreach functions"
    with caplog.at_level(logging.WARNING, "mmcv_runs"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ema_fused.engine.backends._warned", set())
        silently(lambda: mmcv_runs.run(hook, model=model, epochs=1))
    told = [one.getMessage() for one in caplog.records if one.name == "mmcv_runs"]
    assert len([message for message in told if name in message]) == 1


def test_hooks_are_read_as_they_are_written() -> None:
    """The framework looks at methods, and so do editors: nothing of them is hidden."""
    assert ours.EMAHook.before_run.__doc__.startswith("Makes the averaged copy")
    assert ours.EMAHook.after_train_iter.__name__ == "after_train_iter"
