"""A program that a timer interrupts again and again while it swaps averages in and out.

Prints whether both sides held what they should after each interruption, and how many there were.
"""

from __future__ import annotations

import random
import signal
import time

import torch
from torch import nn

from ema_fused.averages.kinds import ExponentialMovingAverage
from tests.networks import differences, snapshot


def main() -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))  # swaps take a while
    averaged = ExponentialMovingAverage(model, 0.25)
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    sides = [(module, snapshot(module)) for module in (model, averaged.module)]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    random.seed(0)
    interrupted = 0
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-3, 2e-2))
            for _ in range(100):
                with averaged.swapped(model):
                    time.sleep(0)
        except KeyboardInterrupt:
            interrupted += 1
        if any(differences(snapshot(module), held) for module, held in sides):
            print("mixed up", interrupted)
            return
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("held", interrupted)


if __name__ == "__main__":
    main()
