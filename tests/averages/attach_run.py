"""A training loop with an attached average, on real data; it can kill itself and be resumed.

    python attach_run.py FOLDER STEPS [KILLED_AT]

Writes FOLDER/checkpoint.pt every few steps, and resumes from it where it is there. With KILLED_AT
it dies by SIGKILL in the middle of that step, after the optimizer's half of it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import ema_fused
from ema_fused import MomentumAnnealingEMA
from tests.networks import conv_net

SAVED_EVERY = 4
MICRO_BATCHES = 2


def train(folder: Path, steps: int, killed_at: int | None) -> None:
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    averaged = MomentumAnnealingEMA(model, momentum=0.01, gamma=20, update_buffers=True)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "averaged": averaged}
    done = 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        done = saved["done"]
    else:
        torch.manual_seed(7)
    ema_fused.attach(optimizer, model, averaged)

    for step in range(done, steps):
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            chosen = torch.randint(len(labels), (32,))
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            overflow = torch.inf if step % 7 == 3 else 1.0
            scaler.scale(loss * overflow).backward()
        scaler.step(optimizer)
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        scaler.update()
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            beside = folder / "checkpoint.tmp"
            torch.save({**states, "random": torch.get_rng_state(), "done": step + 1}, beside)
            beside.rename(checkpoint)


if __name__ == "__main__":
    killed = int(sys.argv[3]) if len(sys.argv) > 3 else None
    train(Path(sys.argv[1]), int(sys.argv[2]), killed)
