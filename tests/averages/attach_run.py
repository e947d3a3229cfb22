"""A training loop with an attached average, on real data; it can kill itself and be resumed.

It writes ``checkpoint.pt`` every few steps. It dies in the middle of a step, after the optimizer's
half of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import ema_fused
from ema_fused import MomentumAnnealingEMA
from tests.digits import digits
from tests.networks import conv_net
from tests.processes import die, run_as_asked

STEPS = 30
SAVED_EVERY = 4
MICRO_BATCHES = 2


def train(folder: Path, *, kill_at: int | None, resume: bool) -> None:
    images, labels = digits()
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    averaged = MomentumAnnealingEMA(model, momentum=0.01, gamma=20, update_buffers=True)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "averaged": averaged}
    done = 0
    checkpoint = folder / "checkpoint.pt"
    if resume:
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        done = saved["done"]
    else:
        torch.manual_seed(7)
    ema_fused.attach(optimizer, model, averaged)

    for step in range(done, STEPS):
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            chosen = torch.randint(len(labels), (32,))
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            overflow = torch.inf if step % 7 == 3 else 1.0
            scaler.scale(loss * overflow).backward()
        scaler.step(optimizer)
        if step == kill_at:
            die()
        scaler.update()
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == STEPS:
            states = {name: part.state_dict() for name, part in parts.items()}
            beside = folder / "checkpoint.tmp"
            torch.save({**states, "random": torch.get_rng_state(), "done": step + 1}, beside)
            beside.rename(checkpoint)


if __name__ == "__main__":
    run_as_asked(train)
