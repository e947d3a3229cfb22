"""Train by a config of mmengine, resume, and compare averaged weights with the model's own.

    python examples/mmengine_train.py examples/mmengine_digits.py [--work-dir DIR] [--resume]
        [--cfg-options train_cfg.max_epochs=4 custom_hooks.0.type=EMAHook]

mmengine's log tells the metrics after each epoch, with averaged weights in the model. A table at
the end compares both kinds of weights, as the last checkpoint holds them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor


def main() -> None:
    """Train or resume, then print the table."""
    parser = argparse.ArgumentParser(description="Train by a config of mmengine.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/<name of the config>")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    options = parser.parse_args()

    config = Config.fromfile(options.config)
    config.merge_from_dict(options.cfg_options or {})
    config.work_dir = str(options.work_dir or Path("work_dirs", options.config.stem))
    config.resume = options.resume
    if options.resume:
        # mmengine's checkpoints hold more than tensors (the history of the log). Since 2.6 torch
        # loads that only when told to, and mmengine 0.10.7 doesn't tell it; this variable does.
        # Such a file can run code as it is loaded: resume only what you have saved yourself.
        os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    runner = Runner.from_cfg(config)
    runner.train()
    print(comparison(runner, Path(find_latest_checkpoint(config.work_dir))))


def comparison(runner: Runner, path: Path) -> str:
    """A table: the metrics with averaged weights and with the model's own."""
    checkpoint = torch.load(path, weights_only=False)
    # The average has taken the place of the model's weights: it is what whoever loads the file is
    # to get. The model's own are kept beside it, to resume from.
    averaged = checkpoint["state_dict"]
    own = {
        name.removeprefix("module."): tensor
        for name, tensor in checkpoint["ema_state_dict"].items()
        if name.startswith("module.")
    }
    lines = [f"\nThe weights in {path}:\n"]
    for kind, weights in (("averaged", averaged), ("the model's own", own)):
        found = metrics(runner, weights)
        cells = [f"{name} {value:.2f}" for name, value in found.items()]
        lines.append("   ".join([kind.ljust(len("the model's own")), *cells]))
    return "\n".join(lines)


def metrics(runner: Runner, weights: dict[str, Tensor]) -> dict[str, float]:
    """What the config's evaluator finds with these weights, without any hook."""
    runner.model.load_state_dict(weights)
    runner.model.eval()
    loop = runner.val_loop
    with torch.no_grad():
        for batch in loop.dataloader:
            loop.evaluator.process(runner.model.val_step(batch), batch)
    found: dict[str, float] = loop.evaluator.evaluate(len(loop.dataloader.dataset))
    return found


if __name__ == "__main__":
    main()
